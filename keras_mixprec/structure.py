"""How a model is put together: its layers, and which of them make its outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import keras


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer and where it stands in its model.

    Args:
        path: Names from below the root, joined by "/"; the root's own name for it.
        layer: The layer.
        parent: The place of the layer that holds it, None for the root.
    """

    path: str
    layer: keras.Layer
    parent: Place | None


def walk(model: keras.Model) -> Iterator[Place]:
    """Yield every layer once, parents before their sublayers, the root first."""
    yield from _descend(Place(model.name, model, None), {id(model)}, {})


def _descend(place: Place, seen: set, paths: dict) -> Iterator[Place]:
    yield place
    for layer in place.layer._layers:
        if id(layer) not in seen:
            seen.add(id(layer))
            yield from _descend(_place_below(place, layer, paths), seen, paths)


def _place_below(parent: Place, layer: keras.Layer, paths: dict[str, int]) -> Place:
    path = layer.name if parent.parent is None else f"{parent.path}/{layer.name}"
    paths[path] = paths.get(path, 0) + 1
    if paths[path] > 1:  # Names are unique only within Sequential and Functional.
        path = f"{path}#{paths[path]}"
    return Place(path, layer, parent)


def computes_in_half(layer: keras.Layer) -> bool:
    """Whether a layer computes in float16 or bfloat16."""
    is_input = isinstance(layer, keras.layers.InputLayer)
    return layer.compute_dtype in ("float16", "bfloat16") and not is_input


def any_in_half(model: keras.Model) -> bool:
    """Whether the model or any layer inside it computes in half precision."""
    return any(map(computes_in_half, model._flatten_layers()))


def graph_of(layer: keras.Layer) -> keras.Function | None:
    """Return the graph that runs the layer, or None if Python code does."""
    if isinstance(layer, keras.Sequential):
        return layer._functional
    if isinstance(layer, keras.Function) and not _overrides_call(layer):
        return layer
    return None


def _overrides_call(model: keras.Function) -> bool:
    owner = next(c for c in type(model).__mro__ if "call" in vars(c))
    return not owner.__module__.startswith("keras.src.models.")


def is_builtin(layer: keras.Layer) -> bool:
    """Return whether the layer's class is one of Keras's own."""
    return type(layer).__module__.startswith("keras.src.")


def runs_sublayers_in_python(layer: keras.Layer) -> bool:
    """Return whether the layer has sublayers and calls them from a user's code."""
    own_code = isinstance(layer, keras.Sequential) or not is_builtin(layer)
    return bool(layer._layers) and own_code and graph_of(layer) is None


def is_float(tensor) -> bool:
    """Return whether a tensor of any backend, or a symbolic one, is floating point."""
    return _is_float_dtype(tensor.dtype)


@functools.cache
def _is_float_dtype(dtype):
    # An eager step asks this of everything that a layer puts out.
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype))


def output_layers(graph: keras.Function, moves_values) -> list[keras.Layer]:
    """Return the layers that make the outputs of a graph.

    Operations that are no layers have no policy of their own and layers that only
    move values lose nothing, so the search goes on to what feeds them.

    Args:
        graph: A Functional model, or the graph of a Sequential one.
        moves_values: Function of a layer: whether it only moves values.

    Returns:
        The layers, each once, nested models resolved to their own output layers.
    """
    found: dict[int, keras.Layer] = {}
    seen = set()
    pending = list(graph.outputs)
    while pending:
        operation, index, _ = pending.pop()._keras_history
        if (id(operation), index) in seen:
            continue
        seen.add((id(operation), index))
        is_layer = isinstance(operation, keras.Layer)
        inner = graph_of(operation) if is_layer else None
        if inner is not None:
            pending.extend(inner.outputs)
            continue
        if is_layer:
            found[id(operation)] = operation
        if not is_layer or moves_values(operation):
            pending.extend(operation._inbound_nodes[index].input_tensors)
    return list(found.values())
