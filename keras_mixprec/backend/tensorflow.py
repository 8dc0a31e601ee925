"""TensorFlow: `select` under XLA, `cond` outside it, one decision over replicas."""

import contextlib
import threading

import tensorflow as tf

from keras_mixprec.backend import LARGEST_GRADIENT
from keras_mixprec.backend import stateful

_trace = threading.local()


@contextlib.contextmanager
def _compiled(jit_compile):
    # A graph does not know whether XLA will compile it; the model that traces does.
    before = getattr(_trace, "xla", False)
    _trace.xla = jit_compile
    try:
        yield
    finally:
        _trace.xla = before


def unscale(grads, scale):
    return [_unscale_one(g, scale) for g in grads]


def _unscale_one(grad, scale):
    if isinstance(grad, tf.IndexedSlices):
        # The values alone: dense, an embedding's gradient is as large as its table.
        return tf.IndexedSlices(
            _unscale_one(grad.values, scale), grad.indices, grad.dense_shape
        )
    dtype = tf.float64 if grad.dtype == tf.float64 else tf.float32
    return tf.cast(grad, dtype) / tf.cast(scale, dtype)


def overflow_flags(grads):
    flags = [0 if g is None else _overflows(g) for g in grads]
    return tf.stack([tf.cast(f, tf.int32) for f in flags])


def _overflows(grad):
    values = grad.values if isinstance(grad, tf.IndexedSlices) else grad
    limit = tf.cast(min(LARGEST_GRADIENT, values.dtype.max), values.dtype)
    # NaN compares false with everything.
    return tf.logical_not(tf.reduce_all(tf.abs(values) <= limit))


def commit(flags, grads, update, record, variables):
    """Call `update(grads)` if no flag is set on any replica, then `record(flags)`."""
    strategy = tf.distribute.get_strategy()
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError(
            "`apply()` must be called in a replica context. Received: a call in "
            "cross-replica context. Call it inside `strategy.run(...)`."
        )
    if strategy.num_replicas_in_sync > 1:
        flags = context.all_reduce(tf.distribute.ReduceOp.SUM, flags)
    if not tf.__internal__.distribute.strategy_supports_no_merge_call():
        context.merge_call(
            lambda strategy, flags, grads: _commit_on_all(
                strategy, flags, grads, update, record
            ),
            args=(flags, grads),
        )
        return
    _update_where_finite(flags, lambda: update(grads), variables)
    record(flags)


def _commit_on_all(strategy, flags, grads, update, record):
    # In the cross-replica context: a branch that calls `merge_call`, as every
    # optimizer's update does, may not be taken inside a replica.
    total = strategy.experimental_local_results(flags)[0]
    tf.cond(
        tf.reduce_all(total == 0),
        lambda: _run(strategy.extended.call_for_each_replica, update, args=(grads,)),
        tf.no_op,
    )
    record(total)


def _update_where_finite(flags, update, variables):
    finite = tf.reduce_all(flags == 0)
    half = [v for v in variables if v.dtype == "float16"]
    if half or getattr(_trace, "xla", False):
        _select(finite, update, variables, half)
    else:
        tf.cond(finite, lambda: _run(update), tf.no_op)


def _select(finite, update, variables, half):
    # Under XLA a select fuses into each variable's own update; a branch does not.
    saved = read(variables)
    update()
    for v in half:
        # Weights that are float16 themselves can overflow in the update.
        finite &= tf.reduce_all(tf.math.is_finite(v.value))
    restore_by_select(tf.logical_not(finite), variables, saved)


def _run(function, *args, **kwargs):
    function(*args, **kwargs)
    return tf.no_op()


def read(variables):
    return [v.value.read_value() for v in variables]


def restore_by_select(skipped, variables, saved):
    for v, old in zip(variables, saved, strict=True):
        v.assign(tf.where(skipped, old, v.value.read_value()))


def restore_by_cond(skipped, variables, saved):
    def restore():
        for v, old in zip(variables, saved, strict=True):
            v.assign(old)
        return tf.no_op()

    tf.cond(skipped, restore, tf.no_op)


def wrap_train_step(transaction):
    model = transaction.model

    def restore_if(skipped, variables, saved):
        replicas = model.distribute_strategy.num_replicas_in_sync
        select = getattr(_trace, "xla", False) or replicas > 1
        restore = restore_by_select if select else restore_by_cond
        restore(skipped, variables, saved)

    step = stateful.wrap_train_step(transaction, read, restore_if)

    def compiled_step(data):
        with _compiled(model.jit_compile and not model.run_eagerly):
            return step(data)

    return compiled_step


def _gpus():
    return tf.config.list_physical_devices("GPU")


def memory_info():
    names = [gpu.name.removeprefix("/physical_device:") for gpu in _gpus()]
    info = {n: tf.config.experimental.get_memory_info(n) for n in names}
    return {n: (i["current"], i["peak"]) for n, i in info.items()}


def reset_peak_memory():
    for gpu in _gpus():
        name = gpu.name.removeprefix("/physical_device:")
        tf.config.experimental.reset_memory_stats(name)
    return True


def accelerator():
    if tf.config.list_physical_devices("TPU"):
        return "tpu", None
    capabilities = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability")
        for gpu in _gpus()
    ]
    return ("gpu", min(c or (0, 0) for c in capabilities)) if capabilities else None
