"""Floats as the integers that their bits are: ordered as the magnitudes are.

Limits of IEEE 754 binary16 (float16): largest 65504, and what rounds to it ends below
65520; smallest normal 2**-14, smallest subnormal 2**-24, and up to half of that
rounds to 0.
"""

import functools
import math
import operator
from typing import Any

import ml_dtypes
import numpy as np
from keras import ops

ROUNDS_TO_INFINITY = 65520.0
SMALLEST_NORMAL = 2.0**-14
ROUNDS_TO_ZERO = 2.0**-25
# Of dtypes that `pattern_of` takes.
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def has_pattern(dtype: str) -> bool:
    """Return whether `pattern_of` takes a dtype.

    Args:
        dtype: Name of a float dtype.
    """
    return dtype in _BYTES


def pattern_of(xp: Any, x: Any, dtype: str) -> Any:
    """Return the bits of magnitudes, as int32 of the same shape.

    Args:
        xp: NumPy, or `keras.ops` for tensors.
        x: Array or tensor.
        dtype: Name of its dtype.
    """
    mask = 2 ** (8 * _BYTES[dtype] - 1) - 1
    kind = f"int{8 * _BYTES[dtype]}"
    if xp is np:
        return (x.view(kind) & mask).astype("int32")
    # Keras wants to know the last dimension.
    bits = ops.squeeze(ops.view(ops.expand_dims(x, -1), kind), -1)
    return ops.bitwise_and(ops.cast(bits, "int32"), mask)


def value_of(xp: Any, bits: Any, dtype: str) -> Any:
    """Return, as float32, the magnitudes whose bits these are.

    Args:
        xp: NumPy, or `keras.ops` for tensors.
        bits: Array or tensor of int32, as `pattern_of` returns it.
        dtype: Name of the dtype that they are the bits of.
    """
    kind = f"int{8 * _BYTES[dtype]}"
    if xp is np:
        return bits.astype(kind).view(dtype).astype("float32")
    return ops.cast(ops.view(ops.cast(bits, kind), dtype), "float32")


@functools.lru_cache
def bit_limits(dtype: str) -> tuple[int, int, int, int, int]:
    """Return the bit patterns below which a magnitude is 0, is 0 in float16, ...

    ... is subnormal in it or 0, is finite in it, is finite.

    Args:
        dtype: Name of a float dtype.
    """
    above_zero = _first_pattern(ROUNDS_TO_ZERO, dtype, operator.gt)
    normal = _first_pattern(SMALLEST_NORMAL, dtype, operator.ge)
    beyond = _first_pattern(ROUNDS_TO_INFINITY, dtype, operator.ge)
    return 1, above_zero, normal, beyond, _first_pattern(math.inf, dtype, operator.ge)


def _first_pattern(value, dtype, compare):
    """Return the first bit pattern of `dtype` whose value compares so with `value`."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(over="ignore"):
        nearest = np.array([value]).astype(kind)
    bits = int(nearest.view(f"int{8 * kind.itemsize}")[0])
    return bits if compare(float(nearest[0]), value) else bits + 1
