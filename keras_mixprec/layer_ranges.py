"""What a layer's values look like against float16's range, by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mixprec import ranges
from keras_mixprec.difference import flat_floats


def bytes_per_example(outputs: Any) -> float:
    """Return the bytes of one example's float outputs in float32."""
    floats = flat_floats(outputs)
    return float(sum(4 * a.size / max(len(a), 1) for a in floats if a.ndim))


def described(
    forward: list[np.ndarray], back: list[np.ndarray], sizes: list[float]
) -> dict[str, float]:
    """Return the measurements of one layer, by name.

    Args:
        forward: Measurements of its outputs.
        back: Measurements of their gradients, scaled.
        sizes: Bytes of its outputs, per call.
    """
    outputs, gradients = ranges.merged(forward), ranges.merged(back)
    found = {"activation_bytes": max(sizes)}
    if outputs is not None:
        found["max_abs"] = outputs.max_abs
        found["headroom"] = ranges.LARGEST / max(outputs.max_abs, 2.0**-24)
    if gradients is not None:
        known = max(gradients.values - gradients.zero, 1)
        found["gradient_max_abs"] = gradients.max_abs
        found["underflow_share"] = gradients.to_zero / known
    return found
