"""The search for the fewest layers in float32: greedy, and measured at each step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from collections.abc import Sequence

from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import LayerPlan
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.probes import loop_around
from keras_mixprec.structure import walk
from keras_mixprec.trials import GRADIENT_TOLERANCE
from keras_mixprec.trials import Trials

# How many of the worst layers are tried out before one of them is chosen.
_TRIED = 3
CALIBRATED = "calibrated"


class Search:
    """Moves layers of a plan to float32, and back, until its error is small enough.

    Args:
        trials: The measurements.
        plan: The plan to begin with; changed in place.
        half: Path -> half policy, of the rows that may change.
        target: Float, the relative error of the outputs to reach.
        cost: Function of a row: what it costs to have the layer in float32.
        deadline: When to stop measuring one by one, in `time.monotonic` seconds.
        progress: Called as `progress(error, plan)` after each measurement. Defaults to
            nothing.
    """

    def __init__(
        self,
        trials: Trials,
        plan: PrecisionPlan,
        half: dict[str, str],
        target: float,
        cost: Callable[[LayerPlan], float],
        deadline: float,
        progress: Callable = lambda error, plan: None,
    ):
        self.trials, self.plan, self.target = trials, plan, target
        self.cost, self.deadline, self.progress = cost, deadline, progress
        self._half, self._last_error = half, 0.0
        self._inside = _rows_inside(trials.model, plan)

    def run(self, batches: Sequence[int]) -> float:
        """Change the plan until both passes are right on the batches.

        Args:
            batches: Ints, the batches to measure.

        Returns:
            The error of the outputs, above the target only if no layer is left.
        """
        error = self._forward(batches)
        while error <= self.target and self._mend_gradients(batches):
            error = self._forward(batches)
        return self._prune(batches, error)

    def error(self, batches: Sequence[int]) -> float:
        """Return the error of the outputs, as the plan is now.

        Args:
            batches: Ints, the batches to measure.
        """
        return self._error(self.plan, batches)

    def promote_worst(self, batches: Sequence[int]) -> tuple[str, str] | None:
        """Move the layer that is most to blame for the outputs' error to float32.

        Args:
            batches: Ints, the batches to measure.

        Returns:
            Its path and the reason, or None if no layer is left.
        """
        ranked = self._ranked(batches)
        if not ranked:
            return None
        path, own = ranked[0]
        reason = _own(own)
        self._promote(self.plan, path, reason)
        return path, reason

    @property
    def timed_out(self) -> bool:
        """Whether the time for measurements is over."""
        return time.monotonic() > self.deadline

    # -- to float32 -----------------------------------------------------------------

    def _forward(self, batches):
        error = self._error(self.plan, batches)
        while error > self.target:
            ranked = self._ranked(batches)
            if not ranked:
                return error
            for path, reason in self._chosen(ranked, error, batches):
                self._promote(self.plan, path, reason)
            error = self._error(self.plan, batches)
        return error

    def _ranked(self, batches):
        """Return half rows as (path, own error), the most to blame first.

        While there is time, one that is lost, or fails, stands alone.
        """
        errors = {
            path: 0.0 if math.isnan(error) else error
            for path, error in self.trials.own_errors(self.plan, batches).items()
            if self.plan[path].policy in HALF
        }
        first = [one for one in errors.items() if math.isinf(one[1])][:1]
        if not first and math.isinf(self._last_error):
            first = self._failing(batches)
        if first and not self.timed_out:
            return first  # What comes after may be lost only because of it.
        errors |= dict(first)
        rest = [(path, 0.0) for path in self._left() if path not in errors]
        return sorted(
            [*errors.items(), *rest],
            key=lambda one: -(one[1] ** 2) / self.cost(self.plan[one[0]]),
        )

    def _left(self):
        """Return the paths of what a plan can still move."""
        units = self._units()
        return [r.path for r in self.plan if r.policy in HALF and r.path in units]

    def _failing(self, batches):
        """Return the layers that feed an operation, no layer, which fails in half."""
        found = copy.deepcopy(self.plan)
        for i in batches:
            self.trials.dry_run(found, i)
        rows = zip(self.plan, found, strict=True)
        moved = [new.path for old, new in rows if old.policy != new.policy]
        return [(path, math.inf) for path in moved][:1]

    def _units(self):
        return {place.path for place in self.trials.places.values()}

    def _chosen(self, ranked, error, batches):
        if self.timed_out:
            return [(path, _own(own)) for path, own in _first_half(ranked)]
        tried = ranked[:_TRIED]
        if len(tried) == 1:
            return [(tried[0][0], _own(tried[0][1]))]
        gains = [self._gain(path, error, batches) for path, _ in tried]
        path, own = tried[gains.index(max(gains))]
        return [(path, _own(own))]

    def _gain(self, path, error, batches):
        """Return what a layer in float32 takes off the error, for its cost."""
        trial = copy.deepcopy(self.plan)
        self._promote(trial, path, "")
        after = self._error(trial, batches)
        if math.isinf(error):
            return -after
        return (error**2 - after**2) / self.cost(self.plan[path])

    def _mend_gradients(self, batches):
        """Move to float32 what damages gradients; return whether there was anything."""
        errors = self.trials.gradient_errors(self.plan, batches)
        guilty = [path for path in errors if errors[path] > GRADIENT_TOLERANCE]
        guilty.sort(key=lambda path: -errors[path])
        chosen = guilty[:1]
        if guilty and self.timed_out:
            others = [path for path in self._left() if path not in guilty]
            chosen = _first_half([*guilty, *others])
        for path in chosen:
            known = errors[path] if path in guilty else None
            self._promote(self.plan, path, _of_gradients(known))
        return bool(guilty)

    def _promote(self, plan, path, reason):
        for row in (plan[path], *(plan[p] for p in self._inside.get(path, ()))):
            if row.policy in HALF:
                row.policy, row.reason = "float32", reason

    # -- and back -------------------------------------------------------------------

    def _prune(self, batches, error):
        """Give back what is not needed any more, the most costly first."""
        moved = [r for r in self.plan if r.policy == "float32" and r.path in self._half]
        moved = [r for r in moved if r.path in self._units()]
        if len(moved) < 2:
            return error
        for row in sorted(moved, key=lambda row: -self.cost(row)):
            if self.timed_out:
                break
            trial = copy.deepcopy(self.plan)
            for path in (row.path, *self._inside.get(row.path, ())):
                trial[path].policy, trial[path].reason = self._half[path], _HALF
            after = self._error(trial, batches)
            if after <= self.target and not self.trials.gradient_errors(trial, batches):
                self.plan.rows, error = trial.rows, after
        return error

    def _error(self, plan, batches):
        self._last_error = error = self.trials.error(plan, batches)
        self.progress(error, plan)
        return error


_HALF = "half precision"


def _own(error):
    what = "not finite" if math.isinf(error) else f"{error:.1e}"
    return f"{CALIBRATED}: own error {what}"


def _of_gradients(error):
    if error is None:
        return f"{CALIBRATED}: the time ran out"
    what = "not finite" if math.isinf(error) else f"{error:.0%} off"
    return f"{CALIBRATED}: its gradients are {what}"


def _first_half(ranked):
    return ranked[: (len(ranked) + 1) // 2]


def _rows_inside(model, plan) -> dict[str, list[str]]:
    """Return path -> the paths of half layers that it runs in a loop over time."""
    inside: dict[str, list[str]] = {}
    for place in walk(model):
        loop = loop_around(place)
        if loop is not None and plan[place.path].policy in HALF:
            inside.setdefault(loop.path, []).append(place.path)
    return inside
