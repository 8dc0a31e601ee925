"""Made-up inputs and targets that fit a model, to time it on."""

from __future__ import annotations

from typing import Any

import click
import keras
import numpy as np

from keras_mixprec.inputs import symbolic_inputs

# Where a model leaves a size open: a sequence of 32, an image of 32 x 32.
_OPEN = 32
_HELP = "Use MODULE:FUNCTION with a function that returns (model, x, y)."


def made_up(model: keras.Model, batch_size: int) -> tuple[Any, Any]:
    """Return inputs and targets for one batch.

    Floats are normal numbers, ids are 0 or 1, targets are classes 0 for a sparse loss
    and numbers from 0 to 1 for any other.

    Args:
        model: Compiled `keras.Model`, built.
        batch_size: Int, how many samples.

    Raises:
        click.ClickException: If the model's inputs or losses are not of these kinds.
    """
    (inputs,), _ = symbolic_inputs(model) if model.built else ((None,), {})
    if inputs is None:
        raise click.ClickException(f"'{model.name}' says no input shapes. {_HELP}")
    outputs = model.compute_output_spec(inputs)
    random = np.random.default_rng(0)
    x = keras.tree.map_structure(lambda i: _input(i, batch_size, random), inputs)
    return x, _targets(outputs, model.loss, batch_size, random)


def _shape(spec, batch_size):
    return (batch_size, *(_OPEN if n is None else n for n in spec.shape[1:]))


def _input(spec, batch_size, random):
    dtype = keras.backend.standardize_dtype(spec.dtype)
    if dtype == "string":
        raise click.ClickException(
            f"The model takes text, which is not made up. {_HELP}"
        )
    shape = _shape(spec, batch_size)
    if "int" in dtype or dtype == "bool":
        return random.integers(0, 2, shape).astype(dtype)
    return random.normal(size=shape).astype("float32")


def _targets(outputs, loss, batch_size, random):
    if isinstance(outputs, dict):
        losses = loss if isinstance(loss, dict) else dict.fromkeys(outputs, loss)
        return {
            name: _targets(output, losses.get(name), batch_size, random)
            for name, output in outputs.items()
        }
    if isinstance(outputs, (list, tuple)):
        losses = loss if isinstance(loss, (list, tuple)) else [loss] * len(outputs)
        return [
            _targets(output, one, batch_size, random)
            for output, one in zip(outputs, losses, strict=True)
        ]
    shape = _shape(outputs, batch_size)
    if "sparse" in _name(loss):
        return np.zeros(shape[:-1], "int32")
    return random.random(shape, dtype="float32")


def _name(loss):
    return str(getattr(loss, "name", getattr(loss, "__name__", loss))).lower()
