"""Sums of squares of many gradients in few kernels of XLA on a GPU: see `shapes`.

XLA fuses what is put together here into the sums; outside XLA it would be copied.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mixprec.backend import shapes
from keras_mixprec.backend.shapes import WIDTH


def sums_of_squares(grads: list, barrier: Callable) -> tuple[Any, list[int]]:
    """Return the sums, and where in them that of each gradient stands.

    Args:
        grads: List of tensors or `None`, whose sum is 0.
        barrier: Function that returns a tensor as it is, and across which XLA fuses
            nothing.

    Returns:
        (float32 vector, list of ints).
    """
    found, rows = shapes.blocks(grads), [ops.zeros((1, WIDTH), "float32")]
    for block in found:
        rows += _rows([grads[i] for i in block.members], block)
    # Put together in the kernel that adds them up, few rows take it longest.
    sums = ops.sum(barrier(ops.concatenate(rows)), axis=1)
    return sums, shapes.order(found, len(grads))


def _rows(grads, block):
    """Return the sums of a block, `(gradients, WIDTH)` for each of its runs."""
    if block.length is None:
        sums = ops.reshape(ops.sum(squares(grads[0])), (1,))
    elif not block.rows[0]:
        flat = ops.stack([ops.reshape(g, (block.length,)) for g in grads])
        return [_filled_up(ops.cast(squares(flat), "float32"), WIDTH)]
    elif block.axes:
        # No other shape before the sum: XLA would lay them out for it.
        sums = ops.sum(squares(ops.concatenate(grads)), axis=block.axes)
        sums = ops.reshape(sums, (sum(block.rows),))
    else:
        placed = zip(grads, block.rows, strict=True)
        laid_out = [_in_rows(g, rows, block.length) for g, rows in placed]
        sums = ops.sum(squares(ops.concatenate(laid_out)), axis=1)
    sums, parts, start = ops.cast(sums, "float32"), [], 0
    for count, rows in block.runs():
        part = ops.reshape(sums[start : start + count * rows], (count, rows))
        times = math.ceil(rows / WIDTH)
        part = ops.reshape(_filled_up(part, times * WIDTH), (count, WIDTH, times))
        parts.append(ops.sum(part, axis=2))
        start += count * rows
    return parts


def _in_rows(grad, rows, length):
    shape = tuple(grad.shape)
    if shapes.is_convolution(shape):
        grad = ops.moveaxis(grad, -1, 0)
    flat = _filled_up(ops.reshape(grad, (1, math.prod(shape))), rows * length)
    return ops.reshape(flat, (rows, length))


def _filled_up(rows, width):
    short = width - rows.shape[1]
    return ops.pad(rows, ((0, 0), (0, short))) if short else rows


def squares(x: Any) -> Any:
    """Return the squares of a tensor, in float32 at least."""
    kind = keras.backend.standardize_dtype(x.dtype)
    return ops.square(x if kind == "float64" else ops.cast(x, "float32"))
