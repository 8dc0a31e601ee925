"""JAX: which gradients no optimizer can use."""

import jax
import jax.numpy as jnp
import keras

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend.squares import squares
from keras_mixprec.backend.squares import sums_of_squares


def flags(grads, scale):
    """Return whether each gradient overflowed, as a bool vector.

    Args:
        grads: List of arrays or `None`, of the scaled loss.
        scale: Scalar array, the loss scale.
    """
    each = _each(grads)
    limit = jnp.minimum(LARGEST_NORM * scale, LARGEST_SCALED_NORM)
    # `isfinite` too: what compiles this may take not(a <= b) for a > b, which is false
    # for NaN as well.
    return ~(jnp.isfinite(each) & (each <= jnp.square(limit)))


def weights_are_split():
    """Return whether `keras.distribution` gives devices parts of the weights."""
    distribution = keras.distribution.distribution()
    return isinstance(distribution, keras.distribution.ModelParallel)


def _each(grads):
    if weights_are_split():
        # They must stay where they are: of two that are split differently one would be
        # moved to the other, and XLA would split the layers before them otherwise than
        # without us.
        grads = [jnp.zeros(()) if g is None else g for g in grads]
        return jnp.stack([jnp.sum(squares(g)).astype(jnp.float32) for g in grads])
    sums, order = sums_of_squares(grads, jax.lax.optimization_barrier)
    return sums[jnp.array(order)]
