"""What a layer costs: its own parameters, and multiply-adds for one example."""

from __future__ import annotations

import math

import keras


def own_parameters(layer: keras.Layer) -> int:
    """Return the number of weights that the layer itself owns."""
    own = layer._trainable_variables + layer._non_trainable_variables
    return sum(math.prod(variable.shape) for variable in own)


def multiply_adds(layer: keras.Layer) -> int:
    """Return the multiply-adds of a layer's kernels for one example.

    A kernel is applied once per output position. Products of two activations, as in
    attention scores, are not counted; sizes that are not known count as 1.

    Args:
        layer: A built layer.
    """
    kernels = [v for v in layer._trainable_variables if len(v.shape) > 1]
    if not kernels or isinstance(layer, keras.layers.Embedding):
        return 0
    size = sum(math.prod(v.shape) for v in kernels)
    return size * _positions(layer, kernels[0])


def _positions(layer, kernel) -> int:
    shapes = layer._build_shapes_dict or {}
    shape = next(iter(shapes.values()), None)
    if not isinstance(shape, (tuple, list)) or not _is_shape(shape):
        return 1
    try:
        output = layer.compute_output_shape(tuple(shape))
    except Exception:  # Shapes of several inputs, or none known: no better guess.
        return 1
    if not _is_shape(output):
        return 1
    sizes = math.prod(x or 1 for x in output[1:])
    return max(1, sizes // _output_channels(layer, kernel))


def _is_shape(shape) -> bool:
    return bool(shape) and all(x is None or isinstance(x, int) for x in shape)


def _output_channels(layer, kernel) -> int:
    """Return how many outputs one application of the kernel makes."""
    if hasattr(layer, "depth_multiplier"):  # (..., channels, multiplier)
        return math.prod(kernel.shape[-2:])
    equation = getattr(layer, "equation", None)
    if equation is None:
        return kernel.shape[-1]
    left, right = equation.replace(" ", "").split("->")
    letters = left.split(",")[1]
    made = [n for c, n in zip(letters, kernel.shape, strict=True) if c in right]
    return math.prod(made)
