"""An overflow that began before the backward pass did."""

import functools

from keras import ops


def blame_loss(losses, before, after):
    """Return an optimizer's counters, a skipped step put down to the loss if it was.

    Args:
        losses: Tensors that are not finite if a loss of the step was not; may be none.
        before: `LossScaleOptimizer.variable_counters` before the step.
        after: The same after the step.
    """
    if not losses:
        return after
    # The sum is finite if all are, but for losses near the largest number there is. XLA
    # makes it part of what reads it, and torch launches less for it than for each.
    total = functools.reduce(
        ops.add, [ops.sum(v) if len(v.shape) else v for v in losses]
    )
    finite = ops.isfinite(total)
    # "Began here, the loss being finite" becomes "the loss being not".
    step = after - before
    blamed = before + ops.stack([step[0], step[2], step[1]])
    return ops.where(finite, after, blamed)
