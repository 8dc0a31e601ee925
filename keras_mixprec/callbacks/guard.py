"""`LossScaleGuard`: ends a run that only skips steps, and says why it does."""

import dataclasses
import logging
import math
import numbers
import warnings
from typing import Any

import keras

from keras_mixprec.attribution import attribute
from keras_mixprec.attribution import read_counters
from keras_mixprec.diagnosis import describe
from keras_mixprec.diagnosis import remedies_for_falling
from keras_mixprec.diagnosis import remedies_for_thrashing
from keras_mixprec.optimizer import LossScaleOptimizer

_logger = logging.getLogger("keras_mixprec")
# Fewer overflows than these are no pattern.
_THRASHING_OVERFLOWS = 4


class LossScaleError(RuntimeError):
    """Training only skips steps, or loses too many of them to a bad loss scale."""


class LossScaleGuard(keras.callbacks.Callback):
    """Stop a run that skips steps instead of training.

    Three things count as violations:

    - `max_consecutive_overflows` steps in a row were skipped, seen at exactly that
      step (with `steps_per_execution`, at the end of the execution);
    - the loss scale fell below `min_scale`, or steps overflow at the optimizer's own
      `min_scale`, where it can fall no further;
    - thrashing: every growth of the scale is undone by an overflow, and more than
      `max_overflow_share` of the steps are lost to that. One step lost at each growth
      is how dynamic scaling works: with the default of 2000 growth steps 0.05%.

    The counters live in the optimizer and are computed in the training graph. The
    guard reads them at the end of an epoch and, in between, only when the present
    row of skipped steps could have become too long: every
    `max_consecutive_overflows` batches while nothing overflows. It does so before a
    batch, since a hook after each batch would switch off Keras's asynchronous
    dispatch.

    Example:

    ```python
    model.fit(x, y, callbacks=[mp.LossScaleGuard(max_consecutive_overflows=20)])
    ```

    Args:
        max_consecutive_overflows: Int >= 1, or `None` to look at the end of epochs
            only, and not at rows of skipped steps. Defaults to `20`.
        min_scale: Float > 0, or `None` for the optimizer's own. Defaults to `None`.
        max_overflow_share: Float in [0, 1], the share of steps that thrashing may
            cost; `None` allows any. Defaults to `0.05`.
        on_violation: `"stop"` raises `LossScaleError`, `"warn"` warns once for each
            kind of violation and lets the run go on. Defaults to `"stop"`.

    Raises:
        ValueError: If an argument is out of its range.
        LossScaleError: During training, at a violation.
    """

    def __init__(
        self,
        max_consecutive_overflows: int | None = 20,
        min_scale: float | None = None,
        max_overflow_share: float | None = 0.05,
        on_violation: str = "stop",
    ):
        super().__init__()
        _check_arguments(
            max_consecutive_overflows, min_scale, max_overflow_share, on_violation
        )
        self.max_consecutive_overflows = max_consecutive_overflows
        self.min_scale = min_scale
        self.max_overflow_share = max_overflow_share
        self.on_violation = on_violation
        self._watches = []
        self._next_check = math.inf

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Find the optimizers that scale a loss, and note where they stand."""
        found = vars(self.model).values()
        found = [v for v in found if isinstance(v, LossScaleOptimizer)]
        optimizers = {id(o): o for o in found}.values()
        self._watches = [_Watch(self, self.model, o) for o in optimizers]
        if not self._watches:
            _logger.warning(
                "LossScaleGuard has nothing to guard: no `mp.LossScaleOptimizer` "
                "trains model '%s'.",
                self.model.name,
            )
        self._plan_next_check(0)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Check, if a row of skipped steps could be too long by now."""
        if batch >= self._next_check:
            self._check()
            self._plan_next_check(batch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Check everything, thrashing included."""
        self._check()
        for watch in self._watches:
            watch.check_thrashing()
        self._plan_next_check(0)

    def _check(self):
        # On JAX asking for the model is what brings its variables up to date.
        if self.model is not None:
            for watch in self._watches:
                watch.check()

    def _plan_next_check(self, batch):
        """A row that is `n` long now cannot be `limit` long before `limit - n` steps.

        So no row of `limit` steps slips through between two checks.
        """
        limit = self.max_consecutive_overflows
        if limit is None or not self._watches:
            self._next_check = math.inf
            return
        longest = max(w.optimizer.consecutive_overflows for w in self._watches)
        # Too long already, and only warned of: no hurry.
        self._next_check = batch + (limit - longest if longest < limit else limit)


class _Watch:
    """One optimizer, and what it looked like when it was last looked at."""

    def __init__(self, guard, model, optimizer):
        self.guard, self.model, self.optimizer = guard, model, optimizer
        self._counters_at_begin = read_counters([optimizer])
        self._last = self._anchor = _read(optimizer)
        self._warned = set()

    def check(self):
        """Raise or warn if too many steps in a row overflow, or the scale is low."""
        now, last = _read(self.optimizer), self._last
        self._last = now
        limit, floor = self.guard.max_consecutive_overflows, self.guard.min_scale
        rule = self.optimizer.rule
        at_minimum = now.scale <= rule.min_scale and rule.backoff_factor < 1
        remedies = remedies_for_falling
        if limit is not None and now.in_a_row >= limit:
            self._report("row", f"{now.in_a_row} steps in a row were skipped", remedies)
        elif floor is not None and now.scale < floor:
            self._report("floor", f"the scale fell below min_scale={floor:g}", remedies)
        elif at_minimum and now.skipped > last.skipped:
            what = "steps overflow although the scale is at the optimizer's minimum"
            self._report("minimum", what, remedies)

    def check_thrashing(self):
        """Raise or warn if growth is undone each time, at the cost of many steps."""
        now, start = _read(self.optimizer), self._anchor
        skipped = now.skipped - start.skipped
        rule, allowed = self.optimizer.rule, self.guard.max_overflow_share
        stays = _one_step_apart(now.scale, start.scale, rule)
        if stays and skipped < _THRASHING_OVERFLOWS * rule.hysteresis:
            return  # Too little to judge: go on from the same start.
        self._anchor = now
        share = skipped / max(skipped + now.applied - start.applied, 1)
        is_dynamic = rule.growth_factor > 1 and rule.backoff_factor < 1
        if stays and is_dynamic and allowed is not None and share > allowed:
            what = (
                f"the scale thrashes: each growth was undone by an overflow, which "
                f"cost {skipped} steps, {share:.0%} of them (allowed: {allowed:.0%})"
            )
            self._report(
                "thrashing",
                what,
                lambda where: remedies_for_thrashing(where, rule, now.scale),
            )

    def _report(self, kind, what, remedies):
        attribution = self._attribution()
        first, second, third = remedies(attribution)
        text = (
            f"Model '{self.model.name}', optimizer '{self.optimizer.name}': {what}. "
            f"The loss scale is {self._last.scale:g}; {self._last.skipped} steps "
            f"were skipped so far. {describe(attribution)} "
            f"Likeliest remedies: (1) {first} (2) {second} (3) {third}"
        )
        if self.guard.on_violation == "stop":
            raise LossScaleError(text)
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=2)

    def _attribution(self):
        since = read_counters([self.optimizer]) - self._counters_at_begin
        return attribute(self.model, since)


@dataclasses.dataclass(frozen=True)
class _State:
    scale: float
    in_a_row: int
    skipped: int
    applied: int


def _read(optimizer):
    # Before the first step of a run an optimizer may have no variables yet.
    scale = optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale
    applied = optimizer.inner_optimizer.iterations
    return _State(
        float(keras.ops.convert_to_numpy(scale)),
        optimizer.consecutive_overflows,
        optimizer.overflow_count,
        int(keras.ops.convert_to_numpy(applied)),
    )


def _one_step_apart(now, start, rule):
    step = max(rule.growth_factor, 1 / rule.backoff_factor)
    return start / step <= now <= start * step


def _check_arguments(limit, min_scale, share, on_violation):
    if limit is not None and not (isinstance(limit, numbers.Integral) and limit >= 1):
        raise _bad("max_consecutive_overflows", "an integer >= 1", limit)
    if min_scale is not None and not (_is_real(min_scale) and min_scale > 0):
        raise _bad("min_scale", "a finite number > 0", min_scale)
    if share is not None and not (_is_real(share) and 0 <= share <= 1):
        raise _bad("max_overflow_share", "a number in [0, 1]", share)
    if on_violation not in ("stop", "warn"):
        raise ValueError(
            "`on_violation` must be 'stop' or 'warn'. Received: "
            f"on_violation={on_violation!r}. Pass 'stop' to end the run."
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _bad(name, expected, value):
    return ValueError(
        f"`{name}` must be {expected} or None. Received: {name}={value!r}. "
        f"Leave `{name}` out for the default, pass None to switch it off."
    )
