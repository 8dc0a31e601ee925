"""Where the outputs of a model come from: what has to be float32 for their sake."""

from __future__ import annotations

import dataclasses

import keras

from keras_mixprec.rules import MOVES_VALUES
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import is_float
from keras_mixprec.structure import output_layers
from keras_mixprec.structure import runs_sublayers_in_python
from keras_mixprec.trace import trace


@dataclasses.dataclass
class OutputSources:
    """The layers that make a model's outputs, by id.

    Args:
        whole: Layers that make an output and stay in float32 with all inside.
        own: Layers whose Python code makes an output from what their sublayers
            return; their own computation stays in float32.
        passing: Layers whose Python code returns what a sublayer made.
    """

    whole: set[int] = dataclasses.field(default_factory=set)
    own: set[int] = dataclasses.field(default_factory=set)
    passing: set[int] = dataclasses.field(default_factory=set)


def output_sources(model: keras.Model, sample=None) -> OutputSources:
    """Find the layers that make a model's outputs.

    Args:
        model: The model.
        sample: Inputs to trace a subclassed model with. Defaults to what the model
            was built with.
    """
    sources = OutputSources()
    _add_sources(model, sources, sample)
    return sources


def _add_sources(layer, sources, sample=None):
    graph = graph_of(layer)
    if graph is not None:
        for maker in output_layers(graph, MOVES_VALUES):
            _add_sources(maker, sources)
    elif runs_sublayers_in_python(layer):
        _add_traced(layer, trace(layer, sample), sources)
    else:
        sources.whole.add(id(layer))


def _add_traced(layer, traced, sources):
    tensors = traced.outputs_of(layer) if traced else []
    inside = {id(x) for x in layer._flatten_layers(include_self=False)}
    makers = _makers(tensors, traced, inside)
    if not makers or None in makers:
        sources.own.add(id(layer))
        return
    sources.passing.add(id(layer))
    for maker in makers:
        if runs_sublayers_in_python(maker):
            _add_traced(maker, traced, sources)
        else:
            _add_sources(maker, sources)


def _makers(tensors, traced, inside) -> list:
    makers: list = []
    for tensor in tensors:
        if not is_float(tensor):
            continue
        maker = traced.maker(tensor, inside)
        makers.append(maker)
        if maker is not None and MOVES_VALUES(maker):
            makers += _makers(traced.inputs_of(maker), traced, inside)
    return makers
