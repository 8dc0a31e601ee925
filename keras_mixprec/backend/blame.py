"""An overflow that began before the backward pass did."""

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
    # All at once: each operation is a launch on torch.
    finite = ops.all(ops.isfinite(ops.concatenate([ops.ravel(v) for v in losses])))
    # "Began here, the loss being finite" becomes "the loss being not".
    step = after - before
    blamed = before + ops.stack([step[0], step[2], step[1]])
    return ops.where(finite, after, blamed)
