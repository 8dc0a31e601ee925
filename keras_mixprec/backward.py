"""The backward pass of one batch: gradients of layers' outputs and of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mixprec.backend import engine
from keras_mixprec.intercept import intercepted
from keras_mixprec.recording import Call
from keras_mixprec.recording import Recording
from keras_mixprec.recording import replay
from keras_mixprec.structure import is_float

Loss = Callable[[Any], Any]


@dataclasses.dataclass
class Gradients:
    """What one backward pass found, times the loss scale.

    Args:
        weights: One array per trainable variable of the model, zeros where the loss
            does not depend on it.
        outputs: Per call of the recording, the gradients of its float outputs.
    """

    weights: list[np.ndarray]
    outputs: list[list[np.ndarray]]


def loss_of(model: keras.Model, x: Any, y: Any, seed: int) -> Loss:
    """Return a function of the model's outputs: its loss on a batch.

    Without targets, or of a model that is not compiled, the mean of the outputs in a
    random direction takes its place.

    Args:
        model: The model.
        x: Inputs of the batch.
        y: Its targets, or None.
        seed: Int, of the direction.
    """
    if y is not None and model.compiled:
        return lambda outputs: model.compute_loss(x, y, outputs, training=False)

    def in_a_direction(outputs):
        random = np.random.default_rng(seed)
        directions = [random.normal(size=o.shape[1:]) for o in _floats(outputs)]
        terms = [
            ops.cast(o, "float32") * ops.convert_to_tensor(d, "float32")
            for o, d in zip(_floats(outputs), directions, strict=True)
        ]
        return sum(map(ops.mean, terms))

    return in_a_direction


def backward(
    model: keras.Model, x: Any, recording: Recording, loss: Loss, scale: float
) -> Gradients:
    """Run a model forward, in inference mode, and backward, as the model is now.

    Args:
        model: The model.
        x: Inputs of the batch.
        recording: The forward pass in the precisions that the model has.
        loss: Function of the outputs, as `loss_of` makes it.
        scale: Float, the loss scale.
    """
    shapes = [_floats(call.outputs) for call in recording.calls]
    flat = [ops.zeros(t.shape, t.dtype) for outputs in shapes for t in outputs]

    def value(taps):
        waiting = iter(taps)

        def around(layer, call, args, kwargs):
            return _mapped(lambda t: t + next(waiting), call(*args, **kwargs))

        with intercepted({call.layer for call in recording.calls}, around):
            return loss(model(x, training=False)) * scale

    weights, found = engine.gradients(value, model.trainable_variables, flat)
    found = iter(map(_array, found, flat))
    return Gradients(
        list(map(_array, weights, model.trainable_variables)),
        [[next(found) for _ in outputs] for outputs in shapes],
    )


def own_gradients(call: Call, upstream: list[np.ndarray]) -> list[np.ndarray]:
    """Return the gradients inside one call, by its float inputs and its weights.

    Args:
        call: The call, as recorded in float32; the layer has its present precision.
        upstream: Gradients of its float outputs, scaled.
    """
    flat = keras.tree.flatten((call.args, call.kwargs))
    places = [i for i, x in enumerate(flat) if hasattr(x, "dtype") and is_float(x)]

    def value(tensors):
        given = list(flat)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        args, kwargs = keras.tree.pack_sequence_as((call.args, call.kwargs), given)
        outputs = _floats(replay(Call(call.layer, args, kwargs)))
        # Each output's gradient is exactly what arrives from above.
        terms = zip(outputs, upstream, strict=True)
        return sum(
            ops.sum(ops.cast(o, "float32") * ops.convert_to_tensor(up))
            for o, up in terms
        )

    variables = call.layer.trainable_variables
    inputs = [flat[i] for i in places]
    weights, tensors = engine.gradients(value, variables, inputs)
    return [*map(_array, weights, variables), *map(_array, tensors, inputs)]


def _floats(structure):
    flat = keras.tree.flatten(structure)
    return [x for x in flat if hasattr(x, "dtype") and is_float(x)]


def _mapped(function, structure):
    return keras.tree.map_structure(
        lambda x: function(x) if hasattr(x, "dtype") and is_float(x) else x, structure
    )


def _array(gradient, like):
    if gradient is None:
        return np.zeros(like.shape, "float32")
    return ops.convert_to_numpy(ops.cast(gradient, "float32"))
