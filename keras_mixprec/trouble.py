"""Whether an epoch was troubled by overflows, and which layer is to blame."""

from __future__ import annotations

import math
from collections.abc import Container
from collections.abc import Sequence

import keras

from keras_mixprec.attribution import attribute
from keras_mixprec.attribution import read_counters
from keras_mixprec.range_report import Frame
from keras_mixprec.transaction import loss_scale_optimizers


class Counters:
    """Where the counters of a model's optimizers stood when an epoch began.

    Args:
        model: `keras.Model`.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._counts = read_counters(loss_scale_optimizers(model))
        self._steps = _steps(model)

    def blamed(
        self, frames: Sequence[Frame], half: Container[str], share: float
    ) -> str | None:
        """Return the layer to blame, `""` if none is known, `None` without trouble.

        Args:
            frames: What was looked at since.
            half: Paths of the layers that compute in half precision.
            share: Float, the share of skipped steps that is no trouble.
        """
        for frame in frames:
            for path, r in frame.of_kind("activation").items():
                if r.nonfinite and path in half:
                    return path
        pairs = zip(_steps(self._model), self._steps, strict=True)
        skipped, applied = (now - before for now, before in pairs)
        if skipped <= max(1, share * (skipped + applied)):
            return None
        overflowed = [frame for frame in frames if frame.overflowed]
        if not overflowed:
            return ""  # Somewhere, in a batch that was not looked at.
        for frame in overflowed:
            path, _ = frame.backward_overflow()
            if path in half:
                return path
        now = read_counters(loss_scale_optimizers(self._model))
        nearest = attribute(self._model, now - self._counts).spread
        return next((path for path in nearest if path in half), "")


def largest_outputs(frames: Sequence[Frame]) -> dict[str, float]:
    """Return layer path -> its largest output, inf where one is beyond float16.

    Args:
        frames: What was looked at.
    """
    found: dict[str, float] = {}
    for frame in frames:
        for path, r in frame.of_kind("activation").items():
            size = math.inf if r.overflows else r.max_abs
            found[path] = max(size, found.get(path, 0.0))
    return found


def _steps(model):
    """Return how many steps were skipped and how many were applied."""
    optimizers = [o for o in loss_scale_optimizers(model) if o.built]
    applied = [
        int(keras.ops.convert_to_numpy(o.inner_optimizer.iterations))
        for o in optimizers
    ]
    return sum(o.overflow_count for o in optimizers), sum(applied)
