"""TensorFlow: an update is kept or not: `select` under XLA on a GPU, else `cond`."""

import functools

import tensorflow as tf

from keras_mixprec.backend import shapes
from keras_mixprec.backend import tensorflow_replicas
from keras_mixprec.backend.tensorflow_overflow import flags
from keras_mixprec.backend.tensorflow_overflow import flags_by_block
from keras_mixprec.backend.tensorflow_xla import barrier
from keras_mixprec.backend.tensorflow_xla import compiling
from keras_mixprec.backend.tensorflow_xla import is_compiling


def commit(update):
    """Carry an `Update` out if no gradient overflowed, and record it."""
    if tf.distribute.get_replica_context() is None:
        raise ValueError(
            "`apply()` must be called in a replica context. Received: a call in "
            "cross-replica context. Call it inside `strategy.run(...)`."
        )
    if tensorflow_replicas.branches_across():
        _commit_on_replicas(update)
    elif any(v.dtype == "float16" for v in update.variables):
        _commit_by_select(update)
    elif _on_gpu(update.variables):
        _commit_on_gpu(update)
    else:
        _commit_by_cond(update)


def _commit_on_gpu(update):
    def whole():
        with compiling(True):
            _commit_by_select(update)

    if is_compiling():
        whole()
    elif update.compilable() and not tf.executing_eagerly():
        # Op by op, a GPU spends the update waiting for launches.
        tf.function(whole, jit_compile=True, autograph=False)()
    else:
        _commit_by_cond(update)


def _on_gpu(variables):
    devices = {v.value.device for v in variables}
    return len(devices) == 1 and "GPU" in devices.pop()


def _commit_by_select(update):
    # On a GPU XLA fuses a select into each variable's own update; a branch it does
    # not. On a CPU it copies for the one and runs the other in place.
    fuses = _fuses(update.variables)
    overflows = (flags_by_block if fuses else _flags)(update.grads, update.scale)
    saved = read(update.variables)
    update.run()
    if any(v.dtype == "float16" for v in update.variables):
        overflows |= _overflowed(update.variables) & tf.constant(update.half())
    restore_by_select(tf.reduce_any(overflows), update.variables, saved)
    update.record(overflows)


def _flags(grads, scale):
    return flags(grads, scale, is_compiling())


def _overflowed(variables):
    # Weights that are float16 themselves can overflow in the update.
    half = [v.value.read_value() for v in variables if v.dtype == "float16"]
    finite = [tf.reduce_all(tf.math.is_finite(v)) for v in half]
    return tf.logical_not(tf.reduce_all(finite))


def _commit_by_cond(update):
    if is_compiling():
        overflows, run = _flags(update.grads, update.scale), update.run
    else:
        overflows, run = _unscaled_first(update)
    tf.cond(tf.reduce_any(overflows), tf.no_op, lambda: _run(run))
    update.record(overflows)


def _unscaled_first(update):
    """Return the flags, and what applies an update whose gradients are divided already.

    TensorFlow multiplies in the gradients' own memory where nothing else reads them,
    and so reads them once less. XLA fuses the product into what uses it.
    """
    unscaled = update.unscale(update.grads)
    pairs = zip(unscaled, update.grads, strict=True)
    if any(quotient is grad is not None for quotient, grad in pairs):
        # Some are no gradients of the scaled loss, and are judged as they come.
        return _flags(update.grads, update.scale), update.run
    overflows = flags(unscaled, update.scale, xla=False, divided=True)
    return overflows, functools.partial(update.apply, unscaled)


def _commit_on_replicas(update):
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        # All GPUs, and XLA compiles what each of them runs.
        tensorflow_replicas.require_one_gpu()
        with tensorflow_replicas.on_reduced_gradients(update.optimizer):
            _commit_by_select(update)
        return
    guarded = functools.partial(_update_if_finite, update)
    tensorflow_replicas.commit(
        _flags(update.grads, update.scale),
        update.grads,
        guarded,
        update.record,
        update.optimizer,
    )


def _update_if_finite(update, grads):
    half = any(v.dtype == "float16" for v in update.variables)
    saved = read(update.variables) if half else []
    update.apply(update.unscale(grads))
    if half:
        restore_by_select(_overflowed(update.variables), update.variables, saved)


def _run(function):
    function()
    return tf.no_op()


def read(variables):
    return [v.value.read_value() for v in variables]


def restore_by_select(skipped, variables, saved):
    shared = {}
    if _fuses(variables):
        # A barrier, or XLA would see that each is but a scalar.
        shared = {
            shape: barrier(tf.broadcast_to(skipped, shape))
            for shape in shapes.shared(variables)
        }
    for v, old in zip(variables, saved, strict=True):
        by = shared.get(tuple(v.shape), skipped)
        v.assign(tf.where(by, old, v.value.read_value()))


def _fuses(variables):
    return is_compiling() and _on_gpu(variables)


def restore_by_cond(skipped, variables, saved):
    def restore():
        for v, old in zip(variables, saved, strict=True):
            v.assign(old)
        return tf.no_op()

    tf.cond(skipped, restore, tf.no_op)
