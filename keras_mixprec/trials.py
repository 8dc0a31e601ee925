"""Plans tried on a model, on a few batches, and measured against float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import keras
import numpy as np

from keras_mixprec import ranges
from keras_mixprec.backward import Gradients
from keras_mixprec.backward import backward
from keras_mixprec.backward import loss_of
from keras_mixprec.backward import own_gradients
from keras_mixprec.difference import Difference
from keras_mixprec.difference import difference
from keras_mixprec.difference import flat_floats
from keras_mixprec.difference import worst
from keras_mixprec.dry_run import dry_run
from keras_mixprec.layer_errors import own_errors
from keras_mixprec.layer_ranges import bytes_per_example
from keras_mixprec.layer_ranges import described
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precisions import preserved
from keras_mixprec.precisions import set_precisions
from keras_mixprec.present import set_all
from keras_mixprec.probes import measurable
from keras_mixprec.recording import pairs
from keras_mixprec.recording import record
from keras_mixprec.structure import Place
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import walk

# Gradients that are off by more than half of themselves point elsewhere.
GRADIENT_TOLERANCE = 0.5
# What the scaled gradients stay below float16's limit by: batches differ.
_HEADROOM = 2.0**3
_LARGEST_SCALE = 2.0**24
# How far a proposed scale may have to fall before a layer is to blame, not the scale.
_STEPS_DOWN, _STEP_DOWN = 5, 4.0


def units(model: keras.Model) -> list[Place]:
    """Return the layers that compute something, each of which a plan can decide on.

    Args:
        model: Built `keras.Model`.
    """
    root = next(walk(model))
    return [*measurable(model), *([root] if graph_of(model) is None else [])]


class Trials:
    """Measures plans of one model. The model's precisions are the caller's to keep.

    Args:
        model: Built `keras.Model`.
        batches: List of `(inputs, targets or None)`.
        seed: Int, for the gradients of a model without loss.
    """

    def __init__(self, model: keras.Model, batches: Sequence[tuple], seed: int = 0):
        self.model = model
        self.places = {id(p.layer): p for p in units(model)}
        self._inputs = [x for x, _ in batches]
        self._losses = [loss_of(model, x, y, seed) for x, y in batches]
        set_all(model, "float32")
        self._exact = [record(model, x, self._layers()) for x in self._inputs]
        self._check_finite()
        self._exact_gradients: list[Gradients | None] = [None] * len(batches)
        self.initial_scale = 1.0

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self._inputs)

    # -- forward --------------------------------------------------------------------

    def error(self, plan: PrecisionPlan, batches: Sequence[int]) -> float:
        """Return the relative error of the outputs, that of the worst batch.

        Args:
            plan: The plan.
            batches: Ints, the batches to measure.
        """
        set_precisions(self.model, plan)
        try:
            found = [
                difference(
                    self._exact[i].outputs,
                    self.model(self._inputs[i], training=False),
                )
                for i in batches
            ]
        except Exception:  # What cannot run has no place in a plan.
            return math.inf
        return worst(d.relative for d in found)

    def own_errors(self, plan: PrecisionPlan, batches: Sequence[int]) -> dict:
        """Return layer path -> its own relative error, in the order of the calls.

        Args:
            plan: The plan.
            batches: Ints, the batches to measure.
        """
        set_precisions(self.model, plan)
        found: dict[int, Difference] = {}
        for i in batches:
            other = record(self.model, self._inputs[i], self._layers())
            for key, error in own_errors(pairs(self._exact[i], other)).items():
                found[key] = found.get(key, Difference()) + error
        return {self.places[key].path: d.relative for key, d in found.items()}

    def dry_run(self, plan: PrecisionPlan, batch: int) -> None:
        """Keep in float32, in the plan, what a forward pass shows to fail.

        Args:
            plan: The plan, changed in place.
            batch: Int, the batch to run.
        """
        dry_run(self.model, plan, self._inputs[batch])

    # -- backward -------------------------------------------------------------------

    def gradient_errors(self, plan: PrecisionPlan, batches: Sequence[int]) -> dict:
        """Return layer path -> its own gradients' error, where a plan damages training.

        Empty if the gradients of all weights are finite and right by and large, at a
        loss scale that is noted as `initial_scale`.

        Args:
            plan: The plan.
            batches: Ints, the batches to measure.
        """
        set_precisions(self.model, plan)
        scale = self._proposed_scale(plan, batches)
        for _ in range(_STEPS_DOWN):
            found = [self._weights_error(i, scale) for i in batches]
            if not any(error.nonfinite for error in found):
                break
            scale = max(scale / _STEP_DOWN, 1.0)
        self.initial_scale = scale
        if not worst(error.relative for error in found) > GRADIENT_TOLERANCE:
            return {}
        return self._own_gradient_errors(plan, batches, scale)

    def _proposed_scale(self, plan, batches):
        """The largest power of two that leaves headroom, by the float32 gradients."""
        if "mixed_float16" not in plan.counts():
            return 1.0
        largest = 0.0
        for i in batches:
            found = self._exact_gradient(i)
            arrays = [*found.weights, *(g for gs in found.outputs for g in gs)]
            largest = max([largest, *(np.abs(a).max(initial=0.0) for a in arrays)])
        if not 0 < largest < math.inf:
            return 1.0
        fitting = math.floor(math.log2(ranges.LARGEST / _HEADROOM / largest))
        return float(min(max(2.0**fitting, 1.0), _LARGEST_SCALE))

    def _weights_error(self, i, scale):
        exact = self._exact_gradient(i)
        recording = record(self.model, self._inputs[i], self._layers())
        loss = self._losses[i]
        try:
            found = backward(self.model, self._inputs[i], recording, loss, scale)
        except Exception:  # An operation without gradient in this type.
            return Difference(nonfinite=1)
        return difference([w * scale for w in exact.weights], found.weights)

    def _exact_gradient(self, i):
        if self._exact_gradients[i] is None:
            self._exact_gradients[i] = self._in_float32(
                lambda: backward(
                    self.model, self._inputs[i], self._exact[i], self._losses[i], 1.0
                )
            )
        return self._exact_gradients[i]

    def _in_float32(self, measure):
        with preserved(self.model):
            set_all(self.model, "float32")
            return measure()

    def _own_gradient_errors(self, plan, batches, scale):
        half = {row.path for row in plan if row.policy in HALF}
        found: dict[str, Difference] = {}
        for i in batches:
            exact = self._exact[i].calls
            for call, upstream in zip(
                exact, self._exact_gradient(i).outputs, strict=True
            ):
                path = self.places[id(call.layer)].path
                if path in half and any(up.any() for up in upstream):
                    error = self._own_gradient_error(call, upstream, scale)
                    found[path] = found.get(path, Difference()) + error
        return {path: error.relative for path, error in found.items()}

    def _own_gradient_error(self, call, upstream, scale):
        scaled = [up * np.float32(scale) for up in upstream]
        try:
            exact = self._in_float32(lambda: own_gradients(call, scaled))
        except Exception:  # A layer that cannot be called alone.
            return Difference()
        try:
            return difference(exact, own_gradients(call, scaled))
        except Exception:  # An operation without gradient in this type.
            return Difference(nonfinite=1)

    # -- ranges ---------------------------------------------------------------------

    def measurements(self, batches: Sequence[int]) -> dict[str, dict[str, float]]:
        """Return layer path -> what its outputs and their gradients look like.

        `max_abs` and `headroom` (65504 over it) of the outputs in float32,
        `gradient_max_abs` and `underflow_share` (of the values that are not 0, those
        that float16 makes 0) of their gradients at `initial_scale`, and
        `activation_bytes` of one example in float32.

        Args:
            batches: Ints, the batches to measure.
        """
        rows: dict[str, tuple[list, list, list]] = {}
        for i in batches:
            gradients = self._exact_gradient(i).outputs
            for call, upstream in zip(self._exact[i].calls, gradients, strict=True):
                path = self.places[id(call.layer)].path
                forward, back, sizes = rows.setdefault(path, ([], [], []))
                forward += map(ranges.measure_array, flat_floats(call.outputs))
                back += [
                    ranges.measure_array(up * self.initial_scale) for up in upstream
                ]
                sizes.append(bytes_per_example(call.outputs))
        return {path: described(*found) for path, found in rows.items()}

    def _check_finite(self):
        for recording in self._exact:
            found = difference(recording.outputs, recording.outputs)
            if found.lost:
                raise ValueError(
                    "Expected a model whose outputs are finite in float32. Received: "
                    f"model '{self.model.name}', {found.lost} of whose outputs are inf "
                    "or NaN. Calibrate it on other data, or from sound weights."
                )

    def _layers(self):
        return [place.layer for place in self.places.values()]
