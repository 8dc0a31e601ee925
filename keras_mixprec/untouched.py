"""Do to a model what one likes, and have it back as it was."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import keras
import numpy as np

from keras_mixprec import compile_hook


@contextlib.contextmanager
def left_as_it_was(model: keras.Model) -> Iterator[None]:
    """Put back, at the end, every variable and attribute of a model and its layers.

    Args:
        model: `keras.Model`, built.
    """
    hooked = compile_hook.is_installed()
    values = [(v, _copied(v)) for v in [*model.variables, *model.metrics_variables]]
    layers = [
        (layer, type(layer), _shallow(layer)) for layer in model._flatten_layers()
    ]
    try:
        yield
    finally:
        for layer, kind, attributes in layers:
            object.__setattr__(layer, "__class__", kind)
            _put_back(layer, attributes)
        for variable, value in values:
            variable.assign(value)
        if not hooked:
            compile_hook.uninstall()
        gc.collect()


@contextlib.contextmanager
def unchanged_variables(model: keras.Model) -> Iterator[None]:
    """Put back, at the end, what a forward pass writes: counters, statistics, seeds.

    Args:
        model: `keras.Model`, built.
    """
    variables = model.non_trainable_variables + model.metrics_variables
    values = [(v, _copied(v)) for v in variables]
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)


def _copied(variable):
    # A copy: on a CPU the array may be the variable's own memory.
    return np.array(keras.ops.convert_to_numpy(variable), copy=True)


def _shallow(layer):
    """Return name -> (value, copy of its items if it is a plain container)."""
    plain = (list, dict, set)
    return {
        name: (value, value.copy() if type(value) in plain else None)
        for name, value in vars(layer).items()
    }


def _put_back(layer, attributes):
    vars(layer).clear()
    for name, (value, items) in attributes.items():
        if items is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(items)
        vars(layer)[name] = value
