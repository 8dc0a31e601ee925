"""TensorFlow: which gradients no optimizer can use."""

import tensorflow as tf

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend.shapes import group_by_shape
from keras_mixprec.backend.shapes import order

# The square of a gradient that is not there.
_NONE = 0.0


def flags(grads, scale, xla: bool):
    """Return whether each gradient overflowed, as a bool vector.

    Args:
        grads: List of tensors, `IndexedSlices` or `None`, of the scaled loss.
        scale: Scalar tensor, the loss scale.
        xla: Whether XLA compiles what calls this.
    """
    square = _square_by_product if xla else _square
    values = [_values(g) for g in grads]
    squares = [_NONE if v is None else square(_at_least_float32(v)) for v in values]
    return _too_large(tf.stack(squares), scale)


def flags_by_shape(grads, scale):
    """The same for XLA on a GPU: one reduction per shape.

    Launching two hundred kernels costs more than reading what they read. XLA fuses
    the stack into the reduction; outside XLA it would be a copy.
    """
    values = [_values(g) for g in grads]
    groups, squares = group_by_shape(values), [tf.constant([_NONE])]
    for members in groups:
        stacked = _at_least_float32(tf.stack([values[i] for i in members]))
        sums = tf.reduce_sum(tf.square(stacked), axis=tuple(range(1, stacked.ndim)))
        squares.append(tf.cast(sums, tf.float32))
    each = tf.gather(tf.concat(squares, 0), order(groups, len(values)))
    return _too_large(each, scale)


def _values(grad):
    return grad.values if isinstance(grad, tf.IndexedSlices) else grad


def _at_least_float32(value):
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def _square(value):
    # The one kernel that squares and adds in one pass.
    return tf.cast(2 * tf.nn.l2_loss(value), tf.float32)


def _square_by_product(value):
    # XLA on a CPU neither vectorizes nor splits a reduction to a scalar, but it does
    # a matrix product: three times as fast.
    rows = tf.reshape(value, (-1, value.shape[-1] if value.ndim else 1))
    ones = tf.ones((rows.shape[1],), value.dtype)
    sums = tf.linalg.matvec(tf.square(rows), ones)
    return tf.cast(tf.reduce_sum(sums), tf.float32)


def _too_large(squares, scale):
    limit = tf.minimum(LARGEST_NORM * scale, LARGEST_SCALED_NORM)
    # `is_finite` too: TensorFlow's graph optimizer takes not(a <= b) for a > b, which
    # is false for NaN as well.
    usable = tf.math.is_finite(squares) & (squares <= tf.square(limit))
    return tf.logical_not(usable)
