"""Probes: statistics of what every layer puts out, and how they leave a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mixprec.backend import engine
from keras_mixprec.ranges import FIELDS
from keras_mixprec.structure import Place
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import is_float
from keras_mixprec.structure import walk

_WIDTH = len(FIELDS)
_KINDS = "activation", "gradient"


class Probes:
    """What was found in the layers of a model, and the log, a variable that holds it.

    The backend's carrier brings it from the layers to the optimizer. A step's entry in
    the log has one row of `FIELDS` for each measurement: a header with the loss scale,
    then per layer and call the output and its gradient, then the gradient of each
    weight.

    Args:
        model: Built `keras.Model`.
        chosen: Callable, `path -> bool`, the layers to measure.
        calls: Int, how many calls or outputs of a layer to measure in a step.
        steps: Int, how many steps the log holds.
    """

    def __init__(self, model: keras.Model, chosen: Callable, calls: int, steps: int):
        self._calls = calls
        self._places = [p for p in measurable(model) if chosen(p.path)]
        self._index = {id(p.layer): i for i, p in enumerate(self._places)}
        # One of the user's own may compute with the gradients.
        own_step = type(model).train_step is not keras.Model.train_step
        paths = [p.path for p in self._places]
        self._carrier = engine.carrier(paths, calls, own_step)
        self._owners = {
            id(variable): place.path
            for place in walk(model)
            for variable in place.layer._trainable_variables
            if chosen(place.path)
        }
        weights = model.trainable_variables
        self._weights = [v for v in weights if id(v) in self._owners]
        rows = 1 + 2 * calls * len(self._places) + len(self._weights)
        self.log = keras.Variable(
            initializer="zeros",
            shape=(steps, rows, _WIDTH),
            dtype="float32",
            autocast=False,
            name="keras_mixprec_log",
        )
        self.variables = [*self._carrier.variables, self.log]
        self.compiles = self._carrier.compiles
        self._sources: dict[tuple[int, int], tuple[int, int]] = {}
        self._tapped: dict[int, tuple] = {}
        self._called: dict[int, int] = {}

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers that have a probe."""
        return [place.layer for place in self._places]

    def values(self) -> list:
        """Return copies of what `variables` hold, on the devices that hold them."""
        return [ops.copy(ops.convert_to_tensor(v)) for v in self.variables]

    def start(self) -> None:
        """Begin a step: no layer was called yet."""
        self._sources, self._tapped, self._called = {}, {}, {}
        self._carrier.start()

    def tap(self, layer: keras.Layer, x: Any) -> Any:
        """Return an output of a layer, which is measured.

        A tensor that a layer inside has put out already is measured once.

        Args:
            layer: One of `layers`.
            x: What it returned: a tensor, or anything else, which passes.
        """
        if keras.backend.is_keras_tensor(x) or not hasattr(x, "dtype"):
            return x
        index = self._index[id(layer)]
        call = self._called.get(index, 0)
        if call == self._calls or not is_float(x):
            return x
        self._called[index] = call + 1
        known, source = self._tapped.get(id(x), (None, None))
        if known is not None and known() is x:
            self._sources[index, call] = source
            return x
        self._sources[index, call] = index, call
        x = self._carrier.tap(index, call, x)
        self._tapped[id(x)] = weakref.ref(x), (index, call)
        return x

    def entry(self, grads: list, variables: list, scale: Any) -> Any:
        """Return the log's entry of one step.

        Args:
            grads: List of gradients, `None` where there is none.
            variables: List of the variables they are for, probes among them.
            scale: Scalar tensor, the loss scale.
        """
        by_id = {id(v): g for v, g in zip(variables, grads, strict=True)}
        # Ones: an entry that is not there is all zeros, and a scale may be 0.
        width = ((0, 0), (0, _WIDTH - 1))
        header = ops.pad(ops.reshape(scale, (1, 1)), width, constant_values=1)
        weights = [by_id.get(id(variable)) for variable in self._weights]
        rows = self._carrier.rows(lambda v: by_id.get(id(v)), weights)
        return ops.concatenate([header, rows])

    def steps(self, log: Any) -> list[np.ndarray]:
        """Return the entries of a log, oldest first.

        Args:
            log: The value of `log`.
        """
        return [step for step in ops.convert_to_numpy(log)[::-1] if step[0, 1]]

    def overflowed(self, step: np.ndarray, chosen: Callable) -> bool:
        """Return whether a gradient of a weight was inf or NaN.

        Args:
            step: As `steps` returns it.
            chosen: Callable, `path -> bool`, the layers to look at.
        """
        nonfinite = step[len(step) - len(self._weights) :, FIELDS.index("nonfinite")]
        weights = zip(self._weights, nonfinite, strict=True)
        return any(n and chosen(self._owners[id(v)]) for v, n in weights)

    def decode(
        self, step: np.ndarray, chosen: Callable, calls: int
    ) -> tuple[float, dict]:
        """Return `(loss scale, rows)` of a step.

        Rows are `(layer path, kind) -> list of measurements`, where kind is
        `"activation"`, `"gradient"` (of that activation, scaled) or
        `"weight_gradient"` (scaled), layers in the order of their first call.

        Args:
            step: As `steps` returns it.
            chosen: Callable, `path -> bool`, the layers to return.
            calls: Int, how many calls or outputs of a layer to return.
        """
        rows: dict = {}
        for (layer, nth), (index, call) in self._sources.items():
            path = self._places[layer].path
            first = 1 + 2 * (index * self._calls + call)
            if nth < calls and chosen(path):
                for kind, row in zip(_KINDS, step[first : first + 2], strict=True):
                    rows.setdefault((path, kind), []).append(row)
        weights = step[len(step) - len(self._weights) :]
        for variable, row in zip(self._weights, weights, strict=True):
            path = self._owners[id(variable)]
            if chosen(path):
                rows.setdefault((path, "weight_gradient"), []).append(row)
        return float(step[0, 0]), rows


def measurable(model: keras.Model) -> list[Place]:
    """Return the layers whose outputs can be measured, once each.

    Not the model itself and graphs of layers, whose outputs are those of a layer
    inside; not the inside of layers that loop over time, which runs many times.

    Args:
        model: Built `keras.Model`.
    """
    return [
        place
        for place in walk(model)
        if place.parent
        and graph_of(place.layer) is None
        and not isinstance(place.layer, keras.layers.InputLayer)
        and loop_around(place) is None
    ]


def loop_around(place: Place) -> Place | None:
    """Return the outermost layer that runs this one in a loop over time, if any."""
    loops = (keras.layers.RNN, keras.layers.TimeDistributed)
    parent = place.parent
    if parent is None:
        return None
    outer = loop_around(parent)
    return outer or (parent if isinstance(parent.layer, loops) else None)
