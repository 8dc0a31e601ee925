"""TensorFlow: `select` under XLA, `cond` outside it, one decision over replicas."""

import contextlib
import functools
import threading

import tensorflow as tf

from keras_mixprec.backend import LARGEST_GRADIENT
from keras_mixprec.backend import stateful
from keras_mixprec.backend.shapes import group_by_shape
from keras_mixprec.backend.shapes import order

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


def overflow_flags(grads, scale):
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
    if getattr(_trace, "xla", False):
        return _flags_by_shape(values, scale)
    flags = [False if v is None else _overflow(v[None], scale)[0] for v in values]
    return tf.stack(flags)


def _flags_by_shape(values, scale):
    # One reduction per shape instead of one per gradient: on a GPU, launching two
    # hundred kernels costs more than reading what they read. XLA fuses the stack
    # into the reduction; outside XLA it would be a copy.
    groups, flags = group_by_shape(values), [tf.zeros((1,), tf.bool)]
    for members in groups:
        flags.append(_overflow(tf.stack([values[i] for i in members]), scale))
    return tf.gather(tf.concat(flags, 0), order(groups, len(values)))


def _overflow(stacked, scale):
    limit = tf.minimum(LARGEST_GRADIENT * scale, min(float(stacked.dtype.max), 3e38))
    # NaN compares false with everything.
    usable = tf.abs(stacked) <= tf.cast(limit, stacked.dtype)
    return tf.logical_not(tf.reduce_all(usable, axis=tuple(range(1, stacked.ndim))))


def commit(prepare, update, record, variables, compilable):
    """Call `update(grads)` if no flag is set on any replica, then `record(flags)`."""
    strategy = tf.distribute.get_strategy()
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError(
            "`apply()` must be called in a replica context. Received: a call in "
            "cross-replica context. Call it inside `strategy.run(...)`."
        )
    if strategy.num_replicas_in_sync > 1:
        _commit_on_replicas(context, prepare, update, record)
    elif getattr(_trace, "xla", False):
        _commit_by_select(prepare, update, record, variables)
    elif compilable and not tf.executing_eagerly() and _on_one_gpu(variables):
        _commit_compiled(prepare, update, record, variables)
    else:
        _commit_by_cond(prepare, update, record, variables)


def _commit_on_replicas(context, prepare, update, record):
    flags, grads = prepare()
    counts = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(flags, tf.int32))
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        tf.cond(tf.reduce_any(counts > 0), tf.no_op, lambda: _run(update, grads))
        record(counts > 0)
        return

    def commit_on_all(strategy, counts, grads):
        # In the cross-replica context: a branch that calls `merge_call`, as every
        # optimizer's update does, may not be taken inside a replica.
        total = strategy.experimental_local_results(counts)[0]
        each = strategy.extended.call_for_each_replica
        run = functools.partial(_run, each, update, args=(grads,))
        tf.cond(tf.reduce_any(total > 0), tf.no_op, run)
        record(total > 0)

    context.merge_call(commit_on_all, args=(counts, grads))


def _commit_by_select(prepare, update, record, variables):
    # Under XLA a select fuses into each variable's own update; a branch does not.
    flags, grads = prepare()
    skipped = tf.reduce_any(flags)
    saved = read(variables)
    update(grads)
    for v in variables:
        if v.dtype == "float16":
            # Weights that are float16 themselves can overflow in the update.
            finite = tf.reduce_all(tf.math.is_finite(v.value))
            skipped = tf.logical_or(skipped, tf.logical_not(finite))
    restore_by_select(skipped, variables, saved)
    record(flags)


def _commit_compiled(prepare, update, record, variables):
    # Op by op, a GPU spends the update waiting for launches.
    @tf.function(jit_compile=True, autograph=False)
    def whole():
        with _compiled(True):
            _commit_by_select(prepare, update, record, variables)

    whole()


def _on_one_gpu(variables):
    devices = {v.value.device for v in variables}
    return len(devices) == 1 and "GPU" in devices.pop()


def _commit_by_cond(prepare, update, record, variables):
    if any(v.dtype == "float16" for v in variables):
        _commit_by_select(prepare, update, record, variables)
        return
    flags, grads = prepare()
    tf.cond(tf.reduce_any(flags), tf.no_op, lambda: _run(update, grads))
    record(flags)


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
