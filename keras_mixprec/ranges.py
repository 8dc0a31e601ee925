"""Where the values of a tensor lie against float16's range: statistics, no model.

Limits of IEEE 754 binary16 (float16): largest 65504, and what rounds to it ends below
65520; smallest normal 2**-14, smallest subnormal 2**-24, and up to half of that
rounds to 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from keras import ops

LARGEST = 65504.0
_ROUNDS_TO_INFINITY = 65520.0
_SMALLEST_NORMAL = 2.0**-14
_ROUNDS_TO_ZERO = 2.0**-25
# What `measure` returns, in this order.
FIELDS = (
    "values",
    "nonfinite",
    "beyond",
    "subnormal",
    "to_zero",
    "zero",
    "max_abs",
    "min_abs",
)


@dataclasses.dataclass(frozen=True)
class Range:
    """What `measure` found, as plain numbers.

    Args:
        values: Number of values.
        nonfinite: Of them inf or NaN.
        beyond: Of them finite, but inf in float16.
        subnormal: Of them subnormal in float16: fewer than 11 significant bits.
        to_zero: Of them 0 in float16, though not 0 here.
        zero: Of them exactly 0, by underflow or by design.
        max_abs: Largest finite magnitude, 0.0 where there is none.
        min_abs: Smallest finite magnitude but 0, `None` where there is none.
    """

    values: int
    nonfinite: int
    beyond: int
    subnormal: int
    to_zero: int
    zero: int
    max_abs: float
    min_abs: float | None

    @property
    def underflows(self) -> bool:
        """Whether most of what is not 0 is lost to float16's lower end."""
        small = self.to_zero + self.subnormal
        return small > 0 and 2 * small > self.values - self.nonfinite - self.zero

    @property
    def overflows(self) -> bool:
        """Whether anything is inf or NaN, or would be inf in float16."""
        return self.nonfinite + self.beyond > 0

    def share(self, field: str) -> float:
        """Return a count as a share of all values, in [0, 1].

        Args:
            field: `"nonfinite"`, `"beyond"`, `"subnormal"`, `"to_zero"` or `"zero"`.
        """
        return getattr(self, field) / max(self.values, 1)


def measure(x: Any) -> Any:
    """Return the statistics of a float tensor, in the order of `FIELDS`.

    Args:
        x: Tensor of any float dtype and shape.

    Returns:
        float32 tensor of shape `(len(FIELDS),)`; counts are exact up to 2**24, the
        smallest magnitude is inf where there is none.
    """
    x = ops.cast(x, "float32")
    size = ops.cast(ops.prod(ops.shape(x)), "float32")
    magnitude = ops.abs(x)
    finite = ops.isfinite(x)
    nonzero = ops.logical_and(finite, magnitude > 0)

    def count(condition):
        return ops.sum(ops.cast(condition, "float32"))

    return ops.stack(
        [
            size,
            size - count(finite),
            count(ops.logical_and(finite, magnitude >= _ROUNDS_TO_INFINITY)),
            count(_between(magnitude, _ROUNDS_TO_ZERO, _SMALLEST_NORMAL)),
            count(ops.logical_and(nonzero, magnitude <= _ROUNDS_TO_ZERO)),
            count(ops.equal(magnitude, 0)),
            ops.max(ops.where(finite, magnitude, 0.0), initial=0.0),
            ops.min(ops.where(nonzero, magnitude, float("inf")), initial=float("inf")),
        ]
    )


def merged(rows: Sequence[Sequence[float]]) -> Range | None:
    """Return the `Range` of several measurements taken together.

    Args:
        rows: Rows as `measure` returns them; those of no values are left out.

    Returns:
        A `Range`, or `None` if there are no values.
    """
    rows = [dict(zip(FIELDS, map(float, row), strict=True)) for row in rows]
    rows = [row for row in rows if row["values"]]
    if not rows:
        return None
    counts = {f: int(sum(row[f] for row in rows)) for f in FIELDS[:-2]}
    smallest = min(row["min_abs"] for row in rows)
    return Range(
        **counts,
        max_abs=max(row["max_abs"] for row in rows),
        min_abs=None if smallest == float("inf") else smallest,
    )


def _between(magnitude, low, high):
    return ops.logical_and(magnitude > low, magnitude < high)
