"""What XLA's compiler for GPUs makes one kernel of, and what it does not by itself.

Launching two hundred kernels costs a GPU more than reading what they read.

Gradients are looked at together: the large ones are laid out in rows that one kernel
sums up, and one more sums up the rows of all, where a small gradient is a row as it is.

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
# Operands of one kernel, a bit less than it may have.
_MOST = 64
# Larger ones have a kernel each, which reads twice as fast where it reads one array.
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
    """

    members: list[int]
    rows: list[int]
    length: int | None

    def runs(self) -> list[tuple[int, int]]:
        """Return (gradients, rows of each) for those that follow one another."""
        return [(len([*same]), rows) for rows, same in itertools.groupby(self.rows)]


def blocks(grads: list) -> list[Block]:
    """Return which gradients to look at together; `None` is left out.

    Args:
        grads: List of tensors or `None`.
    """
    alike = collections.defaultdict(list)
    for i, grad in enumerate(grads):
        if grad is not None:
            rows, length = _layout(tuple(grad.shape))
            # What is not known of two shapes may differ: rows of sparse gradients.
            alone = i if length is None or rows * length > _LARGE else None
            alike[str(grad.dtype), length, alone].append((rows, i))
    found = []
    for (_, length, _), members in alike.items():
        members.sort()
        for start in range(0, len(members), _MOST):
            some = members[start : start + _MOST]
            found.append(Block([i for _, i in some], [r for r, _ in some], length))
    return found


def _layout(shape):
    """Return (rows, length) of a gradient."""
    if None in shape:
        return 1, None
    size = math.prod(shape)
    return (0, size) if size <= WIDTH else (math.ceil(size / _LONGEST), _LONGEST)


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
