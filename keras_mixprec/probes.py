"""Probes: how statistics of activations and gradients leave a compiled step.

Each layer's output goes through an identity that takes one argument more, a probe: a
small trainable variable. Its gradient is not a gradient but the statistics of the
output and of the output's gradient. So they leave any step, compiled or not, on any
backend, where gradients do: at the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mixprec.ranges import FIELDS
from keras_mixprec.ranges import measure
from keras_mixprec.structure import Place
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import is_float
from keras_mixprec.structure import walk

_WIDTH = len(FIELDS)


class Probes:
    """One probe per layer, and one more variable, the log, that holds all they found.

    A step's entry in the log has one row of `FIELDS` for each measurement: a header
    with the loss scale, then per layer and call the output and its gradient, then the
    gradient of each weight.

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
        self._taps = [_variable((calls, 2 * _WIDTH), p.path) for p in self._places]
        self._owners = {
            id(variable): place.path
            for place in walk(model)
            for variable in place.layer._trainable_variables
            if chosen(place.path)
        }
        weights = model.trainable_variables
        self._weights = [v for v in weights if id(v) in self._owners]
        rows = 1 + 2 * calls * len(self._taps) + len(self._weights)
        self.log = _variable((steps, rows, _WIDTH), "log")
        self.variables = [*self._taps, self.log]
        self._order: list[str] = []
        self._used: dict[int, int] = {}

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers that have a probe."""
        return [place.layer for place in self._places]

    def start(self) -> None:
        """Begin a step: no layer was called yet."""
        self._used = {}

    def tap(self, layer: keras.Layer, x: Any) -> Any:
        """Return an output of a layer, with the layer's probe attached to it.

        Args:
            layer: One of `layers`.
            x: What it returned: a tensor, or anything else, which passes.
        """
        row = self._used.get(id(layer), 0)
        if keras.backend.is_keras_tensor(x) or not hasattr(x, "dtype"):
            return x
        if not is_float(x) or row >= self._calls:
            return x
        self._used[id(layer)] = row + 1
        index = self._index[id(layer)]
        if self._places[index].path not in self._order:
            self._order.append(self._places[index].path)
        return _tapped(x, ops.convert_to_tensor(self._taps[index]), row)

    def entry(self, grads: list, variables: list, scale: Any) -> Any:
        """Return the log's entry of one step.

        Args:
            grads: List of gradients, `None` where there is none.
            variables: List of the variables they are for, probes among them.
            scale: Scalar tensor, the loss scale.
        """
        by_id = {id(v): g for v, g in zip(variables, grads, strict=True)}
        nothing = ops.zeros((1, _WIDTH), "float32")
        header = [ops.ones(1), ops.reshape(scale, 1), nothing[0, 2:]]
        rows = [ops.expand_dims(ops.concatenate(header), 0)]
        for probe in self._taps:
            tap = by_id.get(id(probe))
            tap = ops.zeros(probe.shape) if tap is None else tap
            rows.append(ops.reshape(tap, (2 * self._calls, _WIDTH)))
        for variable in self._weights:
            grad = by_id.get(id(variable))
            # TensorFlow's sparse gradients: the values alone.
            grad = grad.values if hasattr(grad, "dense_shape") else grad
            rows.append(nothing if grad is None else measure(grad)[None])
        return ops.concatenate(rows)

    def decode(self, log: Any) -> list[tuple[float, dict]]:
        """Return the steps of a log: `(loss scale, rows)`, oldest first.

        Rows are `(layer path, kind) -> list of measurements`, where kind is
        `"activation"`, `"gradient"` (of that activation, scaled) or
        `"weight_gradient"` (scaled), layers in the order of their first call.

        Args:
            log: The value of `log`.
        """
        steps = ops.convert_to_numpy(log)[::-1]
        return [(float(s[0, 1]), self._rows(s[1:])) for s in steps if s[0, 0]]

    def _rows(self, step):
        split = 2 * self._calls * len(self._taps)
        taps = step[:split].reshape(len(self._taps), self._calls, 2, _WIDTH)
        by_path = {p.path: tap for p, tap in zip(self._places, taps, strict=True)}
        rows: dict = {}
        for path in self._order:
            rows[path, "activation"] = by_path[path][:, 0]
            rows[path, "gradient"] = by_path[path][:, 1]
        for variable, row in zip(self._weights, step[split:], strict=True):
            key = self._owners[id(variable)], "weight_gradient"
            rows.setdefault(key, []).append(row)
        return rows


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


def _tapped(x, probe, row):
    @ops.custom_gradient
    def identity(x, probe):
        forward = measure(x)

        def gradient(*args, upstream=None):
            # torch passes it by name, after the inputs.
            upstream = args[0] if upstream is None else upstream
            found = ops.concatenate([forward, measure(upstream)])
            before = ops.zeros((row, found.shape[0]), "float32")
            after = ops.zeros((probe.shape[0] - row - 1, found.shape[0]), "float32")
            return upstream, ops.concatenate([before, found[None], after])

        return x, gradient

    return identity(x, probe)


def _variable(shape, name):
    # Names must differ: torch keeps a model's variables by name.
    name = f"keras_mixprec_probe_{name.replace('/', '_')}"
    # Not autocast: in a float16 layer counts would end at 65504, and be rounded.
    return keras.Variable(
        initializer="zeros", shape=shape, dtype="float32", autocast=False, name=name
    )
