"""Inputs that half precision would falsify before the first layer sees them."""

from __future__ import annotations

from typing import Any

import keras

from keras_mixprec.inputs import symbolic_inputs
from keras_mixprec.rules import INPUT_IDS
from keras_mixprec.rules import RAW_INPUTS
from keras_mixprec.rules import reads_raw_data
from keras_mixprec.rules import takes_ids
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import is_float
from keras_mixprec.structure import runs_sublayers_in_python
from keras_mixprec.structure import walk
from keras_mixprec.trace import trace


def exact_inputs(model: keras.Model, sample: Any = None) -> dict[int, str]:
    """Return the layers whose inputs have to stay exact: id -> reason.

    Args:
        model: The model.
        sample: Inputs whose types tell ids from numbers. Defaults to none; then a
            subclassed model is taken to receive floats.
    """
    found: dict[int, str] = {}
    for place in walk(model):
        graph = graph_of(place.layer)
        if graph is not None:
            for layer in id_carriers(graph):
                found |= {id(x): INPUT_IDS for x in (layer, *_embeddings(layer))}
    if runs_sublayers_in_python(model):
        found |= _raw_inputs_of(model, sample)
    return found


def _raw_inputs_of(model, sample) -> dict[int, str]:
    """The same for a model whose own code passes its inputs on."""
    try:
        inputs = keras.tree.flatten(symbolic_inputs(model, sample))
    except Exception:  # Never built: nothing is known of its inputs.
        inputs = []
    tensors = [x for x in inputs if hasattr(x, "dtype")]
    if tensors and all(is_float(x) for x in tensors) and takes_ids(model):
        return {id(x): INPUT_IDS for x in (model, *_embeddings(model))}
    traced = trace(model, sample)
    given = [x for x in traced.inputs_of(model) if is_float(x)] if traced else []
    for layer, inputs, _ in traced.calls if traced else ():
        if reads_raw_data(layer) and any(x is y for x in inputs for y in given):
            return {id(model): RAW_INPUTS}
    return {}


def _embeddings(layer) -> list[keras.Layer]:
    inside = layer._flatten_layers()
    return [x for x in inside if isinstance(x, keras.layers.Embedding)]


def id_carriers(graph: keras.Function) -> list[keras.Layer]:
    """Return the layers between a float input and a layer that reads it as ids.

    Ids that travel as floats are exact up to 2**24 in float32, but only up to 2048 in
    float16 and 256 in bfloat16.

    Args:
        graph: A Functional model, or the graph of a Sequential one.

    Returns:
        The layers, the readers included, without nested graphs.
    """
    carriers = _Carriers(graph)
    for operation in graph.operations:
        if isinstance(operation, keras.Layer) and takes_ids(operation):
            carriers.follow_back(operation)
    return [layer for layer in carriers.found if graph_of(layer) is None]


class _Carriers:
    """Follows a graph back from the readers of ids to its float inputs."""

    def __init__(self, graph):
        layers_of_nodes = graph._nodes_by_depth.values()
        self.nodes = {id(node) for nodes in layers_of_nodes for node in nodes}
        self.carries: dict[int, bool] = {}
        self.found: list[keras.Layer] = []

    def follow_back(self, operation) -> bool:
        """Return whether a float input reaches it by weightless steps alone."""
        if id(operation) in self.carries:
            return self.carries[id(operation)]
        self.carries[id(operation)] = False  # Ends cycles of shared layers.
        nodes = (n for n in operation._inbound_nodes if id(n) in self.nodes)
        tensors = [tensor for node in nodes for tensor in node.input_tensors]
        # A list, not a generator: every branch has to be followed.
        carries = any([self._comes_as_float(tensor) for tensor in tensors])
        self.carries[id(operation)] = carries
        if carries and isinstance(operation, keras.Layer):
            self.found.append(operation)
        return carries

    def _comes_as_float(self, tensor) -> bool:
        source = tensor._keras_history[0]
        if isinstance(source, keras.layers.InputLayer):
            return keras.backend.is_float_dtype(tensor.dtype)
        return not getattr(source, "weights", None) and self.follow_back(source)
