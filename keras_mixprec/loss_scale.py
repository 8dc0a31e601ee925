"""The loss-scale rule: state in, new state out, no model and no optimizer."""

import dataclasses
from typing import Any
from typing import NamedTuple

from keras import ops


@dataclasses.dataclass(frozen=True)
class LossScaleRule:
    """How the loss scale moves from one step to the next.

    `growth_factor=1.0, backoff_factor=1.0` is a fixed loss scale: steps that
    overflow are still skipped.

    Args:
        initial_scale: Float, the first loss scale. Defaults to `2.0**15`.
        growth_steps: Int, finite steps in a row before the scale grows.
            Defaults to `2000`.
        growth_factor: Float >= 1. Defaults to `2.0`.
        backoff_factor: Float in (0, 1]. Defaults to `0.5`.
        min_scale: Float of at least `2.0**-126`, the scale never falls below. Defaults
            to `2.0**-14`.
        max_scale: Float of at most `2.0**126`, the scale never grows above. Defaults
            to `2.0**24`.
        hysteresis: Int >= 1, overflows to tolerate before the scale backs off:
            the `hysteresis`-th overflow is the first that lowers it.
            Defaults to `1`.
        consecutive_hysteresis: Bool, refill the hysteresis at every finite step
            instead of at every growth. Defaults to `False`.

    Raises:
        ValueError: If a field is out of its range or the bounds cross.
    """

    initial_scale: float = 2.0**15
    growth_steps: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**24
    hysteresis: int = 1
    consecutive_hysteresis: bool = False

    def __post_init__(self):
        _require_number(self)
        for field in dataclasses.fields(self):
            if field.type is int:
                # 2e3 is a number of steps too, but TensorFlow adds no float to it.
                object.__setattr__(self, field.name, int(getattr(self, field.name)))
        bounds = f"min_scale={self.min_scale}, max_scale={self.max_scale}"
        _require(
            self.min_scale <= self.max_scale,
            "`min_scale` must be at most `max_scale`",
            bounds,
            "Swap the two, or leave out the one you do not need.",
        )
        _require(
            self.min_scale >= 2.0**-126 and self.max_scale <= 2.0**126,
            "`min_scale` and `max_scale` must lie in [2**-126, 2**126], so that the "
            "reciprocal of a scale is a normal float32 too",
            bounds,
            "Pass a bound within. A saved model that has others: load it with "
            "`compile=False`, and compile it.",
        )
        _require(
            self.min_scale <= self.initial_scale <= self.max_scale,
            "`initial_scale` must lie in [min_scale, max_scale] = "
            f"[{self.min_scale}, {self.max_scale}]",
            f"initial_scale={self.initial_scale}",
            "Widen the bounds or move the initial scale between them.",
        )
        _require(
            self.growth_steps >= 1,
            "`dynamic_growth_steps` must be an integer >= 1",
            f"dynamic_growth_steps={self.growth_steps}",
            "For a scale that never grows, pass `growth_factor=1.0`.",
        )
        _require(
            1 <= self.growth_factor < float("inf"),
            "`growth_factor` must be a finite number >= 1",
            f"growth_factor={self.growth_factor}",
            "Pass 2.0 to double the scale, 1.0 to keep it.",
        )
        _require(
            0 < self.backoff_factor <= 1,
            "`backoff_factor` must lie in (0, 1]",
            f"backoff_factor={self.backoff_factor}",
            "Pass 0.5 to halve the scale, 1.0 to keep it.",
        )
        _require(
            self.hysteresis >= 1,
            "`hysteresis` must be an integer >= 1",
            f"hysteresis={self.hysteresis}",
            "Pass 1 to back off at the first overflow.",
        )


class LossScaleState(NamedTuple):
    """What the rule remembers between steps: five scalars.

    Attributes:
        scale: float32, the present loss scale.
        growth_tracker: int, finite steps since the scale last moved or a step
            last overflowed.
        hysteresis_left: int in [1, hysteresis], overflows until the next backoff.
        overflow_count: int, steps skipped so far.
        consecutive_overflows: int, steps skipped since the last finite one.
    """

    scale: Any
    growth_tracker: Any
    hysteresis_left: Any
    overflow_count: Any
    consecutive_overflows: Any


def next_state(
    state: LossScaleState, finite: Any, rule: LossScaleRule
) -> LossScaleState:
    """Return the loss-scale state after one step.

    Growth and backoff as in Micikevicius et al., "Mixed Precision Training",
    2018, section 3.2; hysteresis as in DeepSpeed's `DynamicLossScaler`:

        finite:    tracker += 1; at growth_steps: scale *= growth_factor, refill
        overflow:  tracker = 0; hysteresis_left == 1 ? scale *= backoff_factor
                                                     : hysteresis_left -= 1

    Args:
        state: `LossScaleState` of scalars (or of arrays of one shape).
        finite: Bool scalar (or array), whether every gradient was usable.
        rule: `LossScaleRule`.

    Returns:
        The new `LossScaleState`; `min_scale <= scale <= max_scale` always.
    """
    # Arithmetic with plain numbers, which every backend takes as they are; `ops.where`
    # makes tensors of them, which torch copies to a GPU while the host waits.
    kind = state.growth_tracker.dtype
    applied = ops.cast(finite, kind)
    skipped = 1 - applied
    tracker = (state.growth_tracker + 1) * applied
    grow = tracker >= rule.growth_steps
    grown = ops.cast(grow, kind)
    left, back_off = state.hysteresis_left, ops.logical_not(finite)
    # Each operation is a launch on torch, and most runs have no hysteresis.
    if rule.hysteresis > 1:
        refill = applied if rule.consecutive_hysteresis else grown
        used = ops.cast(left > 1, kind) * skipped
        left = left - used
        back_off = skipped > used
        left = left + (rule.hysteresis - left) * refill
    return LossScaleState(
        scale=_next_scale(state.scale, grow, back_off, rule),
        growth_tracker=tracker * (1 - grown),
        hysteresis_left=left,
        overflow_count=state.overflow_count + skipped,
        consecutive_overflows=(state.consecutive_overflows + 1) * skipped,
    )


def _next_scale(scale, grow, back_off, rule):
    grown = ops.where(grow, scale * rule.growth_factor, scale)
    moved = ops.where(back_off, scale * rule.backoff_factor, grown)
    one = ops.ones_like(moved)
    return ops.clip(moved, one * rule.min_scale, one * rule.max_scale)


def _require_number(rule):
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        kind = field.type
        ok = isinstance(value, (int, float)) and not (
            kind is int and int(value) != value
        )
        if not ok:
            name = "dynamic_growth_steps"
            name = name if field.name == "growth_steps" else field.name
            raise TypeError(
                f"`{name}` must be {kind.__name__}. Received: {name}={value!r} "
                f"(of type {type(value).__name__}). Pass a plain Python number."
            )


def _require(condition, expected, received, remedy):
    if not condition:
        raise ValueError(f"{expected}. Received: {received}. {remedy}")
