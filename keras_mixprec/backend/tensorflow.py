"""TensorFlow: a graph, of one device or of several replicas, with XLA or without."""

import functools

import tensorflow as tf

from keras_mixprec import ranges
from keras_mixprec.backend import stateful
from keras_mixprec.backend import tensorflow_replicas
from keras_mixprec.backend import tensorflow_slices  # noqa: F401
from keras_mixprec.backend.gradient_carrier import GradientCarrier
from keras_mixprec.backend.tensorflow_carrier import SparseCarrier
from keras_mixprec.backend.tensorflow_commit import commit  # noqa: F401
from keras_mixprec.backend.tensorflow_commit import read
from keras_mixprec.backend.tensorflow_commit import restore_by_cond
from keras_mixprec.backend.tensorflow_commit import restore_by_select
from keras_mixprec.backend.tensorflow_notes import last_notes  # noqa: F401
from keras_mixprec.backend.tensorflow_products import one_product
from keras_mixprec.backend.tensorflow_xla import barrier
from keras_mixprec.backend.tensorflow_xla import compiling
from keras_mixprec.backend.tensorflow_xla import gpus
from keras_mixprec.backend.tensorflow_xla import is_compiling


def unscale(grads, scale):
    # A product instead of a quotient for each value: the same for powers of two.
    kinds = [tf.float64 if g.dtype == tf.float64 else tf.float32 for g in grads]
    by = {kind: tf.math.reciprocal(tf.cast(scale, kind)) for kind in kinds}
    return [_multiplied(g, by[kind]) for g, kind in zip(grads, kinds, strict=True)]


def _multiplied(grad, by):
    if isinstance(grad, tf.IndexedSlices):
        # The values alone: dense, an embedding's gradient is as large as its table.
        values = _multiplied(grad.values, by)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    return tf.cast(grad, by.dtype) * by


def assign(variables, values):
    for v, value in zip(variables, values, strict=True):
        v.assign(tf.cast(value, v.dtype))


def reduce_gradients(grads):
    return tensorflow_replicas.reduce_gradients(grads)


def wrap_train_step(transaction):
    model = transaction.model
    _require_no_xla_over_replicas(model)

    def restore_if(skipped, variables, saved):
        replicas = model.distribute_strategy.num_replicas_in_sync
        select = is_compiling() or replicas > 1
        restore = restore_by_select if select else restore_by_cond
        restore(skipped, variables, saved)

    step = stateful.wrap_train_step(transaction, read, restore_if, sees_whole_loss)

    def compiled_step(data):
        _require_no_xla_over_replicas(model)
        by_xla = model.jit_compile and not model.run_eagerly
        with compiling(by_xla), one_product(model, by_xla or bool(gpus())):
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


def gradients(function, variables, tensors):
    """Return the gradients of `function(tensors)` by the variables and the tensors."""
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([*values, *tensors])
        value = function(tensors)
    found = tape.gradient(value, [*values, *tensors])
    found = [g if g is None else tf.convert_to_tensor(g) for g in found]
    return found[: len(values)], found[len(values) :]


def activation(function):
    """Return an activation function of Keras's, whose gradient costs little here."""
    return function


def recomputed(function):
    """Return a function of one tensor, which alone is kept for its backward pass.

    Where it is known that XLA compiles it. Op by op its launches would cost more.
    """
    return _recomputed(function) if is_compiling() else function


def _recomputed(function):
    @tf.custom_gradient
    def call(x):
        def gradient(upstream):
            # `tf.recompute_grad` ties it to the upstream gradient by adding 0 to `x`,
            # which XLA does not fuse with what reads the result.
            same = _behind_barrier(x)
            with tf.GradientTape() as tape:
                tape.watch(same)
                y = function(same)
            found = tape.gradient(y, same, upstream, unconnected_gradients="zero")
            # By a 1 that XLA does not know: or it takes the gradient before it is
            # rounded for the sum over the batch, and writes it out in float32 for that.
            return found * _behind_barrier(tf.ones((), found.dtype))

        return function(x), gradient

    return call


@tf.custom_gradient
def _behind_barrier(x):
    # TensorFlow has no gradient for it: that of a gradient passes as it is.
    return barrier(x), lambda upstream: upstream


def carrier(paths, calls, own_step=False):
    # Sparse gradients know no operators.
    kind = GradientCarrier if own_step else SparseCarrier
    return kind(paths, calls, _partial)


def _partial(x):
    if is_compiling():
        # XLA joins reductions of one tensor in one kernel, but not those of what a
        # Triton kernel of its own wrote. Behind a barrier it cannot tell.
        return ranges.partial(x, _behind_barrier)
    if gpus() and not tf.executing_eagerly():
        # Op by op a GPU would wait for thirty launches.
        return _compiled_partial(x), x
    return ranges.partial(x)


@functools.partial(
    tf.function, jit_compile=True, autograph=False, reduce_retracing=False
)
def _compiled_partial(x):
    return ranges.partial(x)[0]


def _used_gpus():
    # Logical ones, as TensorFlow counts memory: a process may hide a GPU from itself.
    # Asked for only where there are GPUs, since that fixes how devices are split.
    used = tf.config.list_logical_devices("GPU") if gpus() else []
    return [gpu.name.removeprefix("/device:") for gpu in used]


def memory_info():
    info = {n: tf.config.experimental.get_memory_info(n) for n in _used_gpus()}
    return {n: (i["current"], i["peak"]) for n, i in info.items()}


def reset_peak_memory():
    for name in _used_gpus():
        tf.config.experimental.reset_memory_stats(name)
    return True


def accelerator():
    if tf.config.list_physical_devices("TPU"):
        return "tpu", None
    capabilities = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability")
        for gpu in gpus()
    ]
    return ("gpu", min(c or (0, 0) for c in capabilities)) if capabilities else None


def xla():
    try:
        tf.function(lambda x: x + 1.0, jit_compile=True)(tf.constant(1.0))
    # A build without XLA, or a device that it does not know: told, not raised.
    except (tf.errors.OpError, ValueError, NotImplementedError) as error:
        return False, f"not in this build of TensorFlow: {error}"
    return True, "works; `fit` uses it unless compiled with jit_compile=False"
