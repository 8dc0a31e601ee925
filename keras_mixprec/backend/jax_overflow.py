"""JAX: which gradients no optimizer can use."""

import jax
import jax.numpy as jnp

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend.squares import squares
from keras_mixprec.backend.squares import sums_of_squares


def flags(grads, scale):
    """Return whether each gradient overflowed, as a bool vector.

    Each is looked at by itself. Put together they would be copied on a CPU; and split
    over devices they must stay where they are: of two that are split differently one
    would be moved to the other, and XLA would split the layers before them otherwise
    than without us.

    Args:
        grads: List of arrays or `None`, of the scaled loss.
        scale: Scalar array, the loss scale.
    """
    grads = [jnp.zeros(()) if g is None else g for g in grads]
    each = [jnp.sum(squares(g)).astype(jnp.float32) for g in grads]
    return _too_large(jnp.stack(each), scale)


def flags_by_block(grads, scale):
    """The same for XLA on a GPU, in few kernels."""
    sums, order = sums_of_squares(grads, jax.lax.optimization_barrier)
    return _too_large(sums[jnp.array(order)], scale)


def _too_large(each, scale):
    limit = jnp.minimum(LARGEST_NORM * scale, LARGEST_SCALED_NORM)
    # `isfinite` too: what compiles this may take not(a <= b) for a > b, which is false
    # for NaN as well.
    return ~(jnp.isfinite(each) & (each <= jnp.square(limit)))
