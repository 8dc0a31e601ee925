"""A progress bar over the time that a search may take: how many steps, nobody knows."""

from __future__ import annotations

import math
import time

import keras

from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan


class TimeBar:
    """Shows how much of its time a search has used, and how far it is.

    Args:
        max_seconds: Float, the time; inf for a counter without end.
        verbose: 0 for silence, 1 for the bar.
    """

    def __init__(self, max_seconds: float, verbose: int):
        self._start = time.monotonic()
        self._bar = keras.utils.Progbar(
            math.ceil(max_seconds) if math.isfinite(max_seconds) else None,
            verbose=verbose,
            stateful_metrics=["error", "float32 layers"],
            unit_name="second",
        )
        self._bar.update(0)

    def show(self, error: float, plan: PrecisionPlan) -> None:
        """Show what was measured last.

        Args:
            error: Float, the error of the outputs.
            plan: The plan that makes it.
        """
        kept = sum(row.policy not in HALF for row in plan)
        # A full bar is one that has ended.
        seconds = min(self._seconds(), (self._bar.target or math.inf) - 1)
        self._bar.update(seconds, [("error", error), ("float32 layers", kept)])

    def end(self) -> None:
        """Fill the bar: all of the time that it took."""
        self._bar.target = max(1, self._seconds())
        self._bar.update(self._bar.target)

    def _seconds(self):
        return int(time.monotonic() - self._start)
