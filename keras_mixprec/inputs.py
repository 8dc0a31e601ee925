"""Inputs to try a model on: symbolic ones, zeros, or a sample of real ones."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_mixprec.structure import graph_of

_UNKNOWN_SIZE = 32


def symbolic_inputs(layer: keras.Layer, sample: Any = None) -> tuple[tuple, dict]:
    """Return the arguments of a layer's call as `KerasTensor`s.

    Args:
        layer: A built layer.
        sample: Inputs whose shapes and types to use. Defaults to those that the
            layer was built or called with.
    """
    if sample is not None:
        return (keras.tree.map_structure(_spec, sample),), {}
    graph = graph_of(layer)
    if graph is not None:
        return (graph._inputs_struct,), {}
    if layer._inbound_nodes:
        arguments = layer._inbound_nodes[0].arguments
        return arguments.args, arguments.kwargs
    shapes = layer._build_shapes_dict
    if len(shapes) == 1:
        return (_specs(next(iter(shapes.values()))),), {}
    return (), {k.removesuffix("_shape"): _specs(s) for k, s in shapes.items()}


def zero_inputs(layer: keras.Layer) -> tuple[tuple, dict]:
    """Return zeros as arguments of a layer's call: one example, unknown sizes 32."""
    return keras.tree.map_structure(_zeros, symbolic_inputs(layer))


def _spec(x):
    return keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype))


def _specs(shapes):
    if isinstance(shapes, dict):
        return {name: _specs(shape) for name, shape in shapes.items()}
    if any(isinstance(x, (tuple, list, dict)) for x in shapes):
        return type(shapes)(_specs(shape) for shape in shapes)
    return keras.KerasTensor(shapes)


def _zeros(x):
    if not isinstance(x, keras.KerasTensor):
        return x
    shape = [_UNKNOWN_SIZE if size is None else size for size in x.shape]
    if shape and x.shape[0] is None:
        shape[0] = 1
    dtype = "float32" if x.dtype == "bfloat16" else x.dtype
    return np.zeros(shape, dtype)
