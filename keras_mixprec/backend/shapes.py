"""What XLA's compiler for GPUs makes one kernel of, and what it does not by itself.

Launching two hundred kernels costs a GPU more than reading what they read.

Gradients are looked at together. Large ones of one shape that are many are summed up
along the rows that they have, by one kernel; the others are laid out in rows of one
length for another. A last one sums up what the rows of all come to, where a small
gradient is a row as it is.

Values are selected together: kernels that read the same array become one, but not
those that share no more than a scalar. So the decision is handed to small variables of
one shape as an array of that shape.
"""

import collections
import itertools
import math
from typing import NamedTuple

# Values in the rows that are summed up at last: a gradient that fits is small.
WIDTH = 1024
# Up to here a row is summed up by one kernel.
_LONGEST = 8192
# The shortest that were measured had 768; of shorter ones nobody knows.
_SHORTEST = 512
# Operands of one kernel, a bit less than it may have.
_MOST = 64
# Values that are worth a kernel of their own, which reads twice as fast: of one array,
# or of several along their own rows.
_LARGE = 2**22
# Dimensions of the kernel of a convolution over an image, the fewest that have their
# own order in memory.
_CONVOLUTION = 4
# Variables of one shape for which an array of it is worth a kernel of its own.
_MANY = 8


class Block(NamedTuple):
    """Gradients of one dtype that one kernel looks at.

    Attributes:
        members: Their positions, those with as many rows next to each other.
        rows: Of each, in how many rows it is summed up; 0 where it is small.
        length: Values in a row, to which the last one is filled up with zeros; that of
            the gradients where they are small; `None` where it is not known.
        axes: The last axes of the gradients, if those are what their rows lie along.
    """

    members: list[int]
    rows: list[int]
    length: int | None
    axes: tuple[int, ...] = ()

    def runs(self) -> list[tuple[int, int]]:
        """Return (gradients, rows of each) for those that follow one another."""
        return [(len([*same]), rows) for rows, same in itertools.groupby(self.rows)]


def blocks(grads: list) -> list[Block]:
    """Return which gradients to look at together; `None` is left out.

    Args:
        grads: List of tensors or `None`.
    """
    alike, many = collections.defaultdict(list), _of_many_values(grads)
    for i, grad in enumerate(grads):
        if grad is not None:
            shape, kind = tuple(grad.shape), str(grad.dtype)
            own = shape[1:] if (kind, shape[1:]) in many else None
            axes = _axes_of_rows(shape) if own else ()
            rows, length = _layout(shape, axes)
            # What is not known of two shapes may differ: rows of sparse gradients.
            alone = i if length is None or rows * length > _LARGE else None
            alike[kind, length, alone, axes and own, axes].append((rows, i))
    found = []
    for (_, length, _, _, axes), members in alike.items():
        members.sort()
        for start in range(0, len(members), _MOST):
            rows, places = zip(*members[start : start + _MOST], strict=True)
            found.append(Block([*places], [*rows], length, axes))
    return found


def _of_many_values(grads):
    """Return (dtype, shape without the first axis) of gradients worth a kernel.

    A kernel that puts several together computes for each value where it lies, unless
    they are put together along the first axis and their rows are rows in memory.
    """
    values = collections.Counter()
    for grad in grads:
        if grad is not None and _axes_of_rows(tuple(grad.shape)):
            values[str(grad.dtype), tuple(grad.shape[1:])] += math.prod(grad.shape)
    return {key for key, number in values.items() if number > _LARGE}


def _axes_of_rows(shape):
    """Return the last axes of a gradient that make a row neither short nor long."""
    if None in shape or is_convolution(shape) or not WIDTH < math.prod(shape) <= _LARGE:
        return ()
    lengths = [math.prod(shape[axis:]) for axis in range(len(shape))]
    fit = [a for a in range(1, len(shape)) if _SHORTEST <= lengths[a] <= _LONGEST]
    return tuple(range(fit[0], len(shape))) if fit else ()


def _layout(shape, axes):
    """Return (rows, length) of a gradient whose rows lie along some axes, if any."""
    if None in shape:
        return 1, None
    size = math.prod(shape)
    if size <= WIDTH:
        return 0, size
    length = math.prod(shape[axis] for axis in axes) if axes else _LONGEST
    return math.ceil(size / length), length


def order(found: list[Block], length: int) -> list[int]:
    """Return where each gradient stands once its block follows the others.

    Position 0 is for those in no block.

    Args:
        found: What `blocks` returned.
        length: Int, the number of gradients.
    """
    members = itertools.chain.from_iterable(block.members for block in found)
    places = {i: at for at, i in enumerate(members, start=1)}
    return [places.get(i, 0) for i in range(length)]


def is_convolution(shape: tuple) -> bool:
    """Return whether a gradient is that of the kernel of a convolution.

    A GPU has it with the outputs first, which are last in the logical order: rows that
    do not begin with them XLA would first transpose it for.
    """
    return len(shape) >= _CONVOLUTION


def shared(variables: list) -> set[tuple]:
    """Return the shapes of which there are many small variables.

    Args:
        variables: List of `keras.Variable`.
    """
    counts = collections.Counter(tuple(v.shape) for v in variables)
    return {s for s, n in counts.items() if n >= _MANY and 1 < math.prod(s) <= _LONGEST}
