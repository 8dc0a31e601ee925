"""Where overflows began: read from the counters in the optimizers, in words for layers.

Backward, an overflow spreads from where it begins to every layer before it. So of the
variables whose gradients overflowed in a step, the one nearest the loss tells where it
began, unless the loss itself was not finite: then it began in the forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import keras
import numpy as np

from keras_mixprec.backend import engine
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.structure import walk


@dataclasses.dataclass(frozen=True)
class OverflowCounters:
    """The counters of some optimizers at one moment. Differences are those of a time.

    Args:
        by_variable: id of a variable -> the variable, and its three counts as
            `LossScaleOptimizer.variable_counters` has them; in the order of the
            optimizers' trainable variables.
    """

    by_variable: dict[int, tuple[keras.Variable, np.ndarray]]

    def __sub__(self, earlier: OverflowCounters) -> OverflowCounters:
        return OverflowCounters(
            {
                key: (v, n - earlier.by_variable[key][1])
                if key in earlier.by_variable
                else (v, n)
                for key, (v, n) in self.by_variable.items()
            }
        )


def read_counters(optimizers: Iterable[LossScaleOptimizer]) -> OverflowCounters:
    """Return what the optimizers counted so far. Reads the device.

    Args:
        optimizers: Loss-scaling optimizers; of those not yet built there is nothing.
    """
    found = {}
    for optimizer in optimizers:
        if optimizer.built:
            counts = keras.ops.convert_to_numpy(optimizer.variable_counters)
            pairs = zip(optimizer._trainable_variables, counts.T, strict=True)
            found |= {id(v): (v, n.copy()) for v, n in pairs}
    return OverflowCounters(found)


@dataclasses.dataclass(frozen=True)
class Attribution:
    """The overflows of some time, each put down to where it began.

    Args:
        began: Layer path -> skipped steps whose overflow began there in the backward
            pass, from the loss back; paths as in `mp.plan`, without zeros.
        spread: Layer path -> skipped steps in which its gradients overflowed, wherever
            that began; of several variables the one with the most; same order.
        nonfinite_loss: Skipped steps in which the loss itself was inf or NaN already,
            or `None` where that is not known.
    """

    began: dict[str, int]
    spread: dict[str, int]
    nonfinite_loss: int | None

    @property
    def steps(self) -> int:
        """Skipped steps of that time."""
        return sum(self.began.values()) + (self.nonfinite_loss or 0)

    def __add__(self, later: Attribution) -> Attribution:
        losses = [self.nonfinite_loss, later.nonfinite_loss]
        losses = [n for n in losses if n is not None]
        order = _merge([*self.spread, *self.began], [*later.spread, *later.began])
        return Attribution(
            _sum(self.began, later.began, order),
            _sum(self.spread, later.spread, order),
            sum(losses) if losses else None,
        )


def attribute(model: keras.Model, counters: OverflowCounters) -> Attribution:
    """Return in which layers the counted overflows began.

    Of the layers, the last that the model lists is taken as the nearest to the loss.

    Args:
        model: The model that was trained.
        counters: A difference of two `read_counters`.
    """
    owners = {
        id(variable): place.path
        for place in walk(model)
        for variable in place.layer._trainable_variables
    }
    began: dict[str, int] = {}
    spread: dict[str, int] = {}
    losses = 0
    for variable, (overflows, began_here, after_loss) in reversed(
        counters.by_variable.values()
    ):
        layer = owners.get(id(variable), variable.path)
        began[layer] = began.get(layer, 0) + int(began_here)
        spread[layer] = max(spread.get(layer, 0), int(overflows))
        losses += int(after_loss)
    return Attribution(
        {layer: n for layer, n in began.items() if n},
        {layer: n for layer, n in spread.items() if n},
        losses if knows_loss(model) else None,
    )


def knows_loss(model: keras.Model) -> bool:
    """Whether it is known of each skipped step if its loss was finite.

    It is read off the metrics that track losses, before they are rolled back. Of
    several replicas each has its own.

    Args:
        model: Compiled `keras.Model`.
    """
    return engine.sees_whole_loss(model) and bool(loss_metrics(model.metrics))


def loss_metrics(metrics: Iterable[keras.Metric]) -> list[keras.Metric]:
    """Return the metrics that track a loss: `"loss"`, `"d_loss"`."""
    return [m for m in metrics if m.name == "loss" or m.name.endswith("_loss")]


def _merge(left, right):
    """Return the entries of both, each once, in an order that is that of both."""
    merged = list(dict.fromkeys(left))
    place = len(merged)
    for entry in reversed(list(dict.fromkeys(right))):
        if entry in merged:
            place = merged.index(entry)
        else:
            merged.insert(place, entry)
    return merged


def _sum(left, right, order):
    found = {key: left.get(key, 0) + right.get(key, 0) for key in order}
    return {key: n for key, n in found.items() if n}
