"""TensorFlow: `select` under XLA on a GPU, else `cond`."""

import contextlib
import functools
import threading

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as xla_ops

from keras_mixprec import ranges
from keras_mixprec.backend import stateful
from keras_mixprec.backend import tensorflow_replicas
from keras_mixprec.backend.gradient_carrier import GradientCarrier
from keras_mixprec.backend.tensorflow_overflow import flags
from keras_mixprec.backend.tensorflow_overflow import flags_by_shape

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


def _xla():
    return getattr(_trace, "xla", False)


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


def assign(variables, values):
    for v, value in zip(variables, values, strict=True):
        v.assign(tf.cast(value, v.dtype))


def reduce_gradients(grads):
    return tensorflow_replicas.reduce_gradients(grads)


def commit(grads, scale, update, record, variables, compilable, optimizer, half):
    """Call `update(grads)` if no gradient overflowed, then `record(flags)`.

    `half()`: of each gradient, whether what overflows in the update is put down to it:
    only what is float16 itself can.
    """
    if tf.distribute.get_replica_context() is None:
        raise ValueError(
            "`apply()` must be called in a replica context. Received: a call in "
            "cross-replica context. Call it inside `strategy.run(...)`."
        )
    step = grads, scale, update, record
    if tensorflow_replicas.branches_across():
        _commit_on_replicas(*step, variables, optimizer, half)
    elif any(v.dtype == "float16" for v in variables):
        _commit_by_select(*step, variables, half)
    elif _on_gpu(variables):
        _commit_on_gpu(*step, variables, compilable)
    else:
        _commit_by_cond(*step)


def _commit_on_gpu(grads, scale, update, record, variables, compilable):
    def whole():
        with _compiled(True):
            _commit_by_select(grads, scale, update, record, variables)

    if _xla():
        whole()
    elif compilable() and not tf.executing_eagerly():
        # Op by op, a GPU spends the update waiting for launches.
        tf.function(whole, jit_compile=True, autograph=False)()
    else:
        _commit_by_cond(grads, scale, update, record)


def _on_gpu(variables):
    devices = {v.value.device for v in variables}
    return len(devices) == 1 and "GPU" in devices.pop()


def _commit_by_select(grads, scale, update, record, variables, half=tuple):
    # On a GPU XLA fuses a select into each variable's own update; a branch it does
    # not. On a CPU it copies for the one and runs the other in place.
    fuses = _xla() and _on_gpu(variables)
    overflows = flags_by_shape(grads, scale) if fuses else flags(grads, scale, _xla())
    saved = read(variables)
    update(grads)
    if any(v.dtype == "float16" for v in variables):
        overflows |= _overflowed(variables) & tf.constant(half())
    restore_by_select(tf.reduce_any(overflows), variables, saved)
    record(overflows)


def _overflowed(variables):
    # Weights that are float16 themselves can overflow in the update.
    half = [v.value.read_value() for v in variables if v.dtype == "float16"]
    finite = [tf.reduce_all(tf.math.is_finite(v)) for v in half]
    return tf.logical_not(tf.reduce_all(finite))


def _commit_by_cond(grads, scale, update, record):
    overflows = flags(grads, scale, _xla())
    tf.cond(tf.reduce_any(overflows), tf.no_op, lambda: _run(update, grads))
    record(overflows)


def _commit_on_replicas(grads, scale, update, record, variables, optimizer, half):
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        # All GPUs, and XLA compiles what each of them runs.
        with tensorflow_replicas.on_reduced_gradients(optimizer):
            _commit_by_select(grads, scale, update, record, variables, half)
        return
    overflows = flags(grads, scale, _xla())
    guarded = functools.partial(_update_if_finite, update, variables)
    tensorflow_replicas.commit(overflows, grads, guarded, record, optimizer)


def _update_if_finite(update, variables, grads):
    half = any(v.dtype == "float16" for v in variables)
    saved = read(variables) if half else []
    update(grads)
    if half:
        restore_by_select(_overflowed(variables), variables, saved)


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
    _require_no_xla_over_replicas(model)

    def restore_if(skipped, variables, saved):
        replicas = model.distribute_strategy.num_replicas_in_sync
        select = _xla() or replicas > 1
        restore = restore_by_select if select else restore_by_cond
        restore(skipped, variables, saved)

    step = stateful.wrap_train_step(transaction, read, restore_if, sees_whole_loss)

    def compiled_step(data):
        _require_no_xla_over_replicas(model)
        with _compiled(model.jit_compile and not model.run_eagerly):
            return step(data)

    return compiled_step


def _require_no_xla_over_replicas(model):
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1 and model.jit_compile and not model.run_eagerly:
        raise ValueError(
            "`jit_compile` must be False in `fit` on several replicas: Keras compiles "
            "the step of all replicas as one, and XLA compiles for one device. "
            f"Received: jit_compile=True and {replicas} replicas of "
            f"{type(model.distribute_strategy).__name__}. Pass `jit_compile=False` to "
            "`compile`."
        )


def sees_whole_loss(model):
    # Each replica has the loss of its own share of the batch.
    return model.distribute_strategy.num_replicas_in_sync == 1


def is_chief(model):
    return model.distribute_strategy.extended.should_checkpoint


def last_notes(note):
    # Keras's `fit`, and with it callbacks, does not run on several workers.
    return []


def gradients(function, variables, tensors):
    """Return the gradients of `function(tensors)` by the variables and the tensors."""
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([*values, *tensors])
        value = function(tensors)
    found = tape.gradient(value, [*values, *tensors])
    found = [g if g is None else tf.convert_to_tensor(g) for g in found]
    return found[: len(values)], found[len(values) :]


def carrier(paths, calls):
    return GradientCarrier(paths, calls, _partial)


def _partial(x):
    if _xla():
        # XLA joins reductions of one tensor in one kernel, but not those of what a
        # Triton kernel of its own wrote. Behind a barrier it cannot tell.
        return ranges.partial(x, lambda x: xla_ops.optimization_barrier(x)[0])
    if _gpus() and not tf.executing_eagerly():
        # Op by op a GPU would wait for thirty launches.
        return _compiled_partial(x)
    return ranges.partial(x)


@functools.partial(
    tf.function, jit_compile=True, autograph=False, reduce_retracing=False
)
def _compiled_partial(x):
    return ranges.partial(x)


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


def xla():
    try:
        tf.function(lambda x: x + 1.0, jit_compile=True)(tf.constant(1.0))
    # A build without XLA, or a device that it does not know: told, not raised.
    except (tf.errors.OpError, ValueError, NotImplementedError) as error:
        return False, f"not in this build of TensorFlow: {error}"
    return True, "works; `fit` uses it unless compiled with jit_compile=False"
