"""Activation functions in float32, between a matrix product and its next in half.

The product and its bias come in half precision and the result goes on in it; only the
function in between sees float32. XLA fuses the two casts with it, and computes Keras's
own functions anew in the backward pass: what is kept for that stays in half too.
"""

from __future__ import annotations

import functools

import keras

from keras_mixprec.backend import engine
from keras_mixprec.structure import is_float


def cast_activation(layer: keras.Layer) -> None:
    """Have a layer compute its activation function in float32, in place.

    Layers without such a function, RNN cells (whose fused kernels compute theirs in
    float32 anyway, and need to know them) and activations that are layers stay as
    they are.

    Args:
        layer: The layer.
    """
    uncast_activation(layer)
    activation = getattr(layer, "activation", None)
    if not _is_function(activation) or hasattr(layer, "recurrent_activation"):
        return

    # Of others nobody knows: one that draws numbers would draw others the second time.
    name = activation.__name__
    is_pure = getattr(keras.activations, name, None) is activation

    @functools.wraps(activation)
    def in_float32(x, *args, **kwargs):
        if not is_float(x):
            return activation(x, *args, **kwargs)

        recomputed = is_pure and not args and not kwargs
        compute = engine.activation(activation) if recomputed else activation

        def function(x):
            y = compute(keras.ops.cast(x, "float32"), *args, **kwargs)
            return keras.ops.cast(y, x.dtype)

        return (engine.recomputed(function) if recomputed else function)(x)

    layer.activation = in_float32
    layer._mixprec_activation = "float32"


def uncast_activation(layer: keras.Layer) -> None:
    """Undo `cast_activation`."""
    if hasattr(layer, "_mixprec_activation"):
        # Unless a user has set another one since.
        layer.activation = getattr(layer.activation, "__wrapped__", layer.activation)
        del layer._mixprec_activation


def _is_function(activation):
    is_layer = isinstance(activation, keras.Layer)
    return callable(activation) and not is_layer and hasattr(activation, "__name__")
