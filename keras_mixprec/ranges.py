"""Where the values of a tensor lie against float16's range: statistics, no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mixprec.bit_patterns import bit_limits
from keras_mixprec.bit_patterns import has_pattern
from keras_mixprec.bit_patterns import pattern_of
from keras_mixprec.bit_patterns import value_of

LARGEST = 65504.0
# Parts of a tensor that are measured apart: two for each multiprocessor of a large GPU,
# since what the threads of one found is added up at a cost; and no more columns in one
# than XLA's GPU compiler reduces in a single pass.
ROWS = 256
_COLUMNS = 2**14
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
# Rows of what `partial` returns.
PARTIAL = len(FIELDS)


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
    return total(partial(x)[0])[0]


def measure_array(x: np.ndarray) -> np.ndarray:
    """Return the same of a NumPy array, by NumPy: nothing compiles, nothing waits.

    Args:
        x: Array of any float dtype and shape.
    """
    x = np.asarray(x, "float32").reshape(1, -1)
    return np.stack(_statistics(np, x, (1,)))[:, 0] if x.size else _nothing(np, ())


def partial(x: Any, barrier: Callable | None = None) -> tuple[Any, Any]:
    """Return statistics of `ROWS` parts of a tensor, for `total`, and the tensor.

    XLA makes one kernel of this that reads the tensor once. Statistics of the whole
    at once take eight: one that reads the tensor, and for each statistic another that
    sums up what the blocks of the first found.

    Args:
        x: Tensor of any float dtype and shape.
        barrier: Identity that the compiler does not look through. Defaults to none.

    Returns:
        float32 tensor of shape `(PARTIAL, ROWS)`, to be concatenated along the first
        axis: XLA joins concatenations of concatenations where they are along one. And
        `x`, behind the barrier: as the rows lie in memory, so that who reads that needs
        no `x` in another layout.
    """
    known = [n for n in x.shape if n is not None]
    size = math.prod(known)
    if not size:
        return _nothing(ops, (ROWS,)), x
    rows = next(n for n in range(min(size, ROWS), 0, -1) if size % n == 0)
    columns = size // rows if len(known) == len(x.shape) else -1
    parts = next((n for n in (1, 2, 4, 8) if 0 < columns <= _COLUMNS * n), 1)
    parts = parts if columns % parts == 0 else 1
    table = ops.reshape(x, (parts, rows, -1 if columns < 0 else columns // parts))
    if barrier is not None:
        table = barrier(table)
        x = ops.reshape(table, ops.shape(x))
    found = _statistics(ops, table, (0, 2))
    found = ops.stack(found)
    if rows < ROWS:
        found = ops.concatenate([found, _nothing(ops, (ROWS - rows,))], axis=1)
    return found, x


def total(partials: Any) -> Any:
    """Return the statistics of the tensors that `partial` was called with.

    Args:
        partials: Tensor of shape `(n * PARTIAL, ROWS)`.

    Returns:
        float32 tensor of shape `(n, len(FIELDS))`.
    """
    partials = ops.reshape(partials, (-1, PARTIAL, ROWS))
    counts = ops.sum(partials[:, :-2], axis=-1)
    # As integers, ordered alike: of floats XLA flushes a denormal to 0.
    extremes = ops.view(partials[:, -2:], "int32")
    extremes = ops.stack(
        [ops.max(extremes[:, 0], axis=-1), ops.min(extremes[:, 1], axis=-1)], axis=-1
    )
    return ops.concatenate([counts, ops.view(extremes, "float32")], axis=-1)


def measure_each(stacked: Any) -> Any:
    """Return the statistics of several small tensors of one shape.

    Args:
        stacked: Tensor of shape `(n, ...)`.

    Returns:
        float32 tensor of shape `(n, len(FIELDS))`.
    """
    x = ops.reshape(stacked, (stacked.shape[0], -1))
    return ops.stack(_statistics(ops, x, (1,)), axis=1)


def _statistics(xp, x, axis):
    """Return one tensor per field; `xp` is NumPy or `keras.ops`.

    On bit patterns as integers, which are ordered as the magnitudes are: of those no
    denormal is flushed to 0. As a float32 no float16 is a denormal; so those are
    counted by floats, which a GPU adds on other units than it compares on.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    kind = dtype if has_pattern(dtype) else "float32"
    wide = "bfloat16" if kind == "bfloat16" else "float32"
    x = x.astype(wide) if xp is np else xp.cast(x, wide)
    bits, limits = pattern_of(xp, x, wide), bit_limits(kind)
    ordered, one, zero = bits, np.int32(1), np.int32(0)
    if kind == "float16":
        ordered, one, zero = xp.abs(x), np.float32(1), np.float32(0)
        limits = np.array(limits, "int16").view("float16").astype("float32").tolist()
    above_0, above_zero, normal, beyond, infinity = limits

    def count(limit, below, others):
        return xp.sum(xp.where(ordered < limit, below, others), axis=axis)

    # For float16 two of the limits are equal to another one: a count less each. From
    # above where next to none is: float sums of very many ones are not exact.
    below = {n: count(n, one, zero) for n in {above_0, above_zero, normal}}
    above = {n: count(n, zero, one) for n in {beyond, infinity}}
    # A size that TensorFlow knows only when it runs is a tensor.
    sizes = x.shape if None not in x.shape else ops.shape(x)
    values = math.prod(sizes[i] for i in axis)
    found = [
        xp.zeros_like(below[above_0], "int32") + values,
        above[infinity],
        above[beyond] - above[infinity],
        below[normal] - below[above_zero],
        below[above_zero] - below[above_0],
        below[above_0],
    ]
    found = [f.astype("float32") if xp is np else ops.cast(f, "float32") for f in found]
    extremes = _extremes(xp, bits, bit_limits(wide)[-1], axis)
    return [*found, *(value_of(xp, bits, wide) for bits in extremes)]


def _extremes(xp, bits, infinity, axis):
    """Return the largest pattern that is finite, the smallest that is not 0.

    0 where none is finite, that of infinity where all are 0. What is not asked for is
    moved to the other end of the integers by an addition, which a GPU does in the same
    instruction as the comparison.
    """
    sign = np.int32(-(2**31))

    def moved(bits, by):
        return xp.bitwise_xor(bits - by, sign)

    largest = xp.maximum(
        xp.max(moved(bits, infinity), axis=axis), moved(np.int32(0), infinity)
    )
    smallest = xp.minimum(
        xp.min(moved(bits, 1), axis=axis), moved(np.int32(infinity), 1)
    )
    return (
        xp.bitwise_xor(largest, sign) + infinity,
        xp.bitwise_xor(smallest, sign) + 1,
    )


def _nothing(xp, shape):
    """Return what `measure` finds in no values, once for each of `shape`."""
    fields = xp.zeros((len(FIELDS) - 1, *shape), "float32")
    none = xp.full((1, *shape), float("inf"), dtype="float32")
    return xp.concatenate([fields, none])


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
