"""How far values in one precision are from the same values in another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_mixprec.structure import is_float

# A root mean square below float16's smallest number counts as that: what should be 0
# and is not quite has no relative error.
_FLOOR = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Difference:
    """Sums over the values that are finite in the reference; differences add up.

    Args:
        values: Number of values compared.
        squared: Sum of (value - reference)**2.
        reference: Sum of reference**2.
        max_abs: Largest |value - reference|, where finite.
        nonfinite: Values that are inf or NaN where the reference is finite.
        lost: Values that are inf or NaN in the reference already.
    """

    values: int = 0
    squared: float = 0.0
    reference: float = 0.0
    max_abs: float = 0.0
    nonfinite: int = 0
    lost: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.values + other.values,
            self.squared + other.squared,
            self.reference + other.reference,
            max(self.max_abs, other.max_abs),
            self.nonfinite + other.nonfinite,
            self.lost + other.lost,
        )

    @property
    def relative(self) -> float:
        """The relative error: sqrt(squared / reference).

        inf if anything is not finite that should be; NaN if the reference holds
        nothing finite to compare with.
        """
        if self.nonfinite:
            return math.inf
        if not self.values:
            return math.nan if self.lost else 0.0
        floor = _FLOOR * math.sqrt(self.values)
        return math.sqrt(self.squared) / max(math.sqrt(self.reference), floor)


def difference(reference: Any, values: Any) -> Difference:
    """Compare two structures of tensors; what is not floating point is left out.

    Args:
        reference: Tensor, or a structure of them.
        values: The same structure.
    """
    pairs = zip(flat_floats(reference), flat_floats(values), strict=True)
    return sum((_compare(a, b) for a, b in pairs), Difference())


def flat_floats(structure: Any) -> list[np.ndarray]:
    """Return the floating-point tensors of a structure as float64 arrays."""
    tensors = [x for x in keras.tree.flatten(structure) if hasattr(x, "dtype")]
    return [_array(x) for x in tensors if is_float(x)]


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, with NaN above none and below all others."""
    known = [error for error in errors if not math.isnan(error)]
    return max(known, default=math.nan)


def _array(x):
    if not isinstance(x, np.ndarray):
        x = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))
    return x.astype("float64")


def _compare(reference, values):
    known = np.isfinite(reference)
    reference_values, values = reference[known], values[known]
    finite = np.isfinite(values)
    off = np.abs(values[finite] - reference_values[finite])
    return Difference(
        values.size,
        float(np.sum(off**2)),
        float(np.sum(reference_values**2)),
        float(off.max(initial=0.0)),
        int(values.size - finite.sum()),
        int(known.size - known.sum()),
    )
