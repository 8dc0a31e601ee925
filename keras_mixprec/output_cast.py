"""Hand on a layer's outputs in another floating-point type than it computes in."""

from __future__ import annotations

import functools

import keras

from keras_mixprec.intercept import restore_call
from keras_mixprec.structure import is_float


def cast_outputs(layer: keras.Layer, dtype: str) -> None:
    """Cast the floating-point outputs of a layer from now on, in place.

    Args:
        layer: The layer.
        dtype: Name of the type to cast to.
    """
    uncast_outputs(layer)
    own, call = vars(layer).get("call"), layer.call

    @functools.wraps(call)
    def cast_call(*args, **kwargs):
        return keras.tree.map_structure(_caster(dtype), call(*args, **kwargs))

    cast_call.own = own
    layer.call = cast_call
    layer._mixprec_cast = dtype


def uncast_outputs(layer: keras.Layer) -> None:
    """Undo `cast_outputs`."""
    if hasattr(layer, "_mixprec_cast"):
        restore_call(layer, layer.call.own)
        del layer._mixprec_cast


def _caster(dtype):
    def cast(x):
        if not hasattr(x, "dtype") or not is_float(x):
            return x
        y = keras.ops.cast(x, dtype)
        mask = getattr(x, "_keras_mask", None)
        if mask is not None:
            y._keras_mask = mask
        return y

    return cast
