"""The train step as a transaction, for the two backends that assign in place."""

import functools

from keras import ops


def wrap_train_step(transaction, read, restore_if):
    """Return the train step with everything but the seeds rolled back on overflow.

    Args:
        transaction: `keras_mixprec.transaction.Transaction`.
        read: Callable `list of variables -> copies` that a later assignment leaves
            alone.
        restore_if: Callable `(skipped, variables, saved)`, assigns the saved values
            back where `skipped` is true.
    """

    def step(data):
        optimizers = transaction.optimizers()
        if not optimizers:
            return transaction.train_step(data)
        variables = transaction.state()
        saved = read(variables)
        before = {id(o): _count(o) for o in optimizers}
        with transaction.requires_scaled_loss():
            logs = transaction.train_step(data)
        changed = [
            ops.not_equal(_count(o), before[id(o)]) for o in optimizers if o.built
        ]
        if not changed:
            return logs
        restore_if(functools.reduce(ops.logical_or, changed), variables, saved)
        return transaction.logs(logs)

    return step


def _count(optimizer):
    # A sum, because a later assignment would show in the variable's own tensor. An
    # optimizer that nobody has used yet has skipped nothing.
    return ops.add(optimizer.overflow_counter, 0) if optimizer.built else 0
