"""Gradients of one shape, to be looked at together.

Launching two hundred kernels costs a GPU more than reading what they read. So a large
gradient is summed up in rows, those of one shape by one kernel; and one more sums up
the rows of all, where a small gradient is a row as it is.
"""

import functools
import math

# Values in the rows that are summed up at last: a gradient that fits is small.
WIDTH = 1024
# Up to here XLA's GPU compiler sums a row in one kernel.
_LONGEST = 8192
# Dimensions of the kernel of a convolution over an image, the fewest that have their
# own order in memory.
_CONVOLUTION = 4


def group_by_shape(grads: list) -> list[list[int]]:
    """Return the positions of the gradients, by shape and dtype; `None` is left out.

    Args:
        grads: List of tensors or `None`.
    """
    groups = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            shape = tuple(grad.shape)
            # What is not known of two shapes may differ: rows of sparse gradients.
            alone = i if None in shape else None
            groups.setdefault((shape, str(grad.dtype), alone), []).append(i)
    return list(groups.values())


def order(groups: list[list[int]], length: int) -> list[int]:
    """Return where each gradient stands once its group follows the others.

    Position 0 is for those in no group.

    Args:
        groups: What `group_by_shape` returned.
        length: Int, the number of gradients.
    """
    places = {i: at for at, i in enumerate(sum(groups, []), start=1)}
    return [places.get(i, 0) for i in range(length)]


def rows_of(shape: tuple) -> int | None:
    """Return in how many rows to sum up a gradient first: at most `WIDTH`.

    As many as leave rows that are short enough, else as many as there can be. A
    convolution's kernel is one row: a GPU has its gradient in another order than the
    logical one, and XLA would first transpose it for a reshape, in float32.

    Args:
        shape: Tuple of ints, `None` where the size is not known.

    Returns:
        Int, or `None` for a gradient that is no longer than `WIDTH` itself.
    """
    if None in shape:
        return 1
    size = math.prod(shape)
    if size <= WIDTH:
        return None
    return 1 if len(shape) >= _CONVOLUTION else _rows(size)


@functools.lru_cache
def _rows(size):
    fitting = [r for r in range(1, WIDTH + 1) if size % r == 0]
    return next((r for r in fitting if size // r <= _LONGEST), fitting[-1])
