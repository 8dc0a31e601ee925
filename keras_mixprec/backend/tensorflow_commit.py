"""TensorFlow: an update is kept or not: `select` under XLA on a GPU, else `cond`."""

import functools

import tensorflow as tf

from keras_mixprec.backend import tensorflow_replicas
from keras_mixprec.backend.tensorflow_overflow import flags
from keras_mixprec.backend.tensorflow_overflow import flags_by_shape
from keras_mixprec.backend.tensorflow_xla import compiling
from keras_mixprec.backend.tensorflow_xla import is_compiling


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
        with compiling(True):
            _commit_by_select(grads, scale, update, record, variables)

    if is_compiling():
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
    fuses = is_compiling() and _on_gpu(variables)
    overflows = (
        flags_by_shape(grads, scale) if fuses else flags(grads, scale, is_compiling())
    )
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
    overflows = flags(grads, scale, is_compiling())
    tf.cond(tf.reduce_any(overflows), tf.no_op, lambda: _run(update, grads))
    record(overflows)


def _commit_on_replicas(grads, scale, update, record, variables, optimizer, half):
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        # All GPUs, and XLA compiles what each of them runs.
        with tensorflow_replicas.on_reduced_gradients(optimizer):
            _commit_by_select(grads, scale, update, record, variables, half)
        return
    overflows = flags(grads, scale, is_compiling())
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
