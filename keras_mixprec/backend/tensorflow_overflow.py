"""TensorFlow: which gradients no optimizer can use."""

import tensorflow as tf

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend.squares import sums_of_squares
from keras_mixprec.backend.tensorflow_xla import barrier

# The square of a gradient that is not there.
_NONE = 0.0


def flags(grads, scale, xla: bool, divided: bool = False):
    """Return whether each gradient overflowed, as a bool vector.

    Args:
        grads: List of tensors, `IndexedSlices` or `None`, of the scaled loss.
        scale: Scalar tensor, the loss scale.
        xla: Whether XLA compiles what calls this.
        divided: Whether they are divided by the loss scale already.
    """
    square = _square_by_product if xla else _half_square
    values = [_values(g) for g in grads]
    squares = [_NONE if v is None else square(_at_least_float32(v)) for v in values]
    # Halves are doubled once for all.
    squares = tf.stack(squares) * (1.0 if xla else 2.0)
    return _too_large(squares, _limit(scale) / scale if divided else _limit(scale))


def flags_by_block(grads, scale):
    """The same for XLA on a GPU, in few kernels."""
    sums, order = sums_of_squares([_values(g) for g in grads], barrier)
    return _too_large(tf.gather(sums, order), _limit(scale))


def _values(grad):
    return grad.values if isinstance(grad, tf.IndexedSlices) else grad


def _at_least_float32(value):
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def _half_square(value):
    # The one kernel that squares and adds in one pass.
    return tf.cast(tf.nn.l2_loss(value), tf.float32)


def _square_by_product(value):
    # XLA on a CPU neither vectorizes nor splits a reduction to a scalar, but it does
    # a matrix product: three times as fast.
    rows = tf.reshape(value, (-1, value.shape[-1] if value.ndim else 1))
    ones = tf.ones((rows.shape[1],), value.dtype)
    sums = tf.linalg.matvec(tf.square(rows), ones)
    return tf.cast(tf.reduce_sum(sums), tf.float32)


def _limit(scale):
    return tf.minimum(LARGEST_NORM * scale, LARGEST_SCALED_NORM)


def _too_large(squares, limit):
    # `is_finite` too: TensorFlow's graph optimizer takes not(a <= b) for a > b, which
    # is false for NaN as well.
    usable = tf.math.is_finite(squares) & (squares <= tf.square(limit))
    return tf.logical_not(usable)
