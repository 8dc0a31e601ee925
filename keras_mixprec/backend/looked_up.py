"""The gradient of a table by the rows that a batch looked up, for XLA on a GPU.

Written out it is as large as the table: zeros are written, rows are added to them, and
the update reads it all. Here only the rows are added up, each id's in a place of its
own, and the gradient is what a gather makes of them: XLA computes a gather in the
kernel that reads it, which then reads one number for each row of the table instead.
Outside XLA it would be written out all the same.
"""

import math
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

# Values in a table from which on the kernels that this takes are paid for.
_LARGE = 2**22
# What is assumed of a batch whose size nobody knows yet.
_ROWS = 2**15
# Numbers that are written and read for each row of the table.
_FOR_EACH_ROW = 4


def pays(table: tuple, number: int | None) -> bool:
    """Return whether a gradient should be left to what reads it.

    Args:
        table: Shape of the table.
        number: Int, rows that were looked up; `None` if it is not known.
    """
    length, *rest = table
    width, number = math.prod(rest), _ROWS if number is None else number
    # Read and written, the sums take as much as the gradient of twice as many rows.
    left = length * (width - _FOR_EACH_ROW) - 2 * number * width
    return length * width > _LARGE and left > 0


class Lookups(NamedTuple):
    """Where the rows of a batch are added up.

    Attributes:
        place_of: Int vector, of each row of the table its place among the sums; 0 if
            nobody asked for it.
        places: Int vector, of each row of the batch the place among the sums; negative
            if what was asked for is in no row of the table.
    """

    place_of: Any
    places: Any


def lookups(ids: Any, length: int) -> Lookups:
    """Return where the rows of a batch are added up.

    Args:
        ids: Int vector, what was looked up.
        length: Int, the rows of the table.
    """
    # Of several places that ask for one row the last is the row's.
    numbers = ops.arange(1, ops.shape(ids)[0] + 1, dtype="int32")
    known = ops.logical_and(ids >= 0, ids < length)
    # What is negative is taken up by nothing.
    ids = ops.where(known, ids, -ops.ones_like(ids))
    place_of = ops.maximum(ops.segment_max(numbers, ids, length), 0)
    places = ops.take(place_of, ops.maximum(ids, 0), axis=0)
    return Lookups(place_of, ops.where(known, places, -1))


def gradient(found: Lookups, rows: Any) -> tuple[Any, Any]:
    """Return the gradient of a table, and the sums that it is made of.

    Rows are added up in float32 at least. An id that is in no row of the table adds
    nothing.

    Args:
        found: What `lookups` returned.
        rows: Tensor `(number, ...)`, the gradient of each row of the batch.

    Returns:
        (tensor `(length, ...)`, tensor `(number + 1, ...)`). The first sum is 0, for
        the rows that nobody asked for, so that both have the same sum of squares.
    """
    if keras.backend.standardize_dtype(rows.dtype) in ("float16", "bfloat16"):
        rows = ops.cast(rows, "float32")
    sums = ops.segment_sum(rows, found.places, ops.shape(rows)[0] + 1)
    return ops.take(sums, found.place_of, axis=0), sums
