"""One forward pass, kept: what each layer was given, and what it returned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras

from keras_mixprec.intercept import intercepted


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a layer.

    Args:
        layer: The layer.
        args: Its positional arguments.
        kwargs: Its keyword arguments, masks and `training` among them.
        inner: The calls that it made itself, in order.
        outputs: What it returned.
    """

    layer: keras.Layer
    args: tuple
    kwargs: dict
    inner: list[Call] = dataclasses.field(default_factory=list)
    outputs: Any = None


@dataclasses.dataclass
class Recording:
    """The calls of one forward pass.

    Args:
        calls: The calls, in order of completion: of a layer and one inside it, the
            inner one first.
        outputs: What the model returned.
    """

    calls: list[Call]
    outputs: Any


def record(model: keras.Model, x: Any, layers: Iterable[keras.Layer]) -> Recording:
    """Run a model on inputs, in inference mode, and note the calls of its layers.

    Args:
        model: The model.
        x: One batch of inputs.
        layers: The layers to note.
    """
    top: list[Call] = []
    stack = [top]
    calls = []

    def around(layer, call, args, kwargs):
        noted = Call(layer, args, kwargs)
        stack[-1].append(noted)
        stack.append(noted.inner)
        try:
            noted.outputs = call(*args, **kwargs)
        finally:
            stack.pop()
        calls.append(noted)
        return noted.outputs

    with intercepted(layers, around):
        outputs = model(x, training=False)
    return Recording(calls, outputs)


def pairs(reference: Recording, other: Recording) -> list[tuple[Call, Call]]:
    """Return the calls of two recordings that are the same call.

    Args:
        reference: A recording.
        other: A recording of the same model, in another precision.
    """
    waiting: dict[int, list[Call]] = {}
    for call in other.calls:
        waiting.setdefault(id(call.layer), []).append(call)
    found = [
        (call, waiting[id(call.layer)].pop(0))
        for call in reference.calls
        if waiting.get(id(call.layer))
    ]
    return found


def replay(call: Call) -> Any:
    """Call a layer again on what it was given, and return what it returns now.

    Args:
        call: The call; tensors among its arguments are cast as the layer's policy
            asks for.
    """
    return call.layer(*call.args, **call.kwargs)


@contextlib.contextmanager
def fixed_inside(call: Call, other: Call) -> Iterator[list]:
    """Inside, what a layer calls itself returns what was recorded.

    So that an error inside a layer counts for the sublayer that makes it, not for the
    layer around. Yields a list that fills with what the layer hands to sublayers: of
    each, the arguments as recorded and as they are now.

    Args:
        call: The recorded call.
        other: The same call in the present precision, whose types the recorded
            outputs are cast to.
    """
    waiting = list(zip(call.inner, other.inner, strict=False))
    given: list = []

    def around(layer, run, args, kwargs):
        if not waiting or waiting[0][0].layer is not layer:
            return run(*args, **kwargs)
        recorded, like = waiting.pop(0)
        given.append(((recorded.args, recorded.kwargs), (args, kwargs)))
        return keras.tree.map_structure(_cast, recorded.outputs, like.outputs)

    with intercepted(list({id(c.layer): c.layer for c in call.inner}.values()), around):
        yield given


def _cast(x, like):
    return keras.ops.cast(x, like.dtype) if hasattr(like, "dtype") else x
