"""The train step as a transaction, for the two backends that assign in place."""

import functools

from keras import ops


def wrap_train_step(transaction, read, restore_if):
    """Return the train step with everything but the seeds rolled back on overflow.

    Args:
        transaction: `keras_mixprec.transaction.Transaction`.
        read: Callable `list of variables -> list of tensors`, copies that a later
            assignment leaves alone.
        restore_if: Callable `(skipped, variables, saved)`, assigns the saved values
            back where `skipped` is true.
    """

    def step(data):
        optimizers = transaction.optimizers()
        if not optimizers:
            return transaction.train_step(data)
        variables = transaction.variables() + transaction.model.metrics_variables
        saved = read(variables)
        before = [read([o.overflow_counter])[0] if o.built else 0 for o in optimizers]
        with transaction.requires_scaled_loss():
            logs = transaction.train_step(data)
        after = read([o.overflow_counter for o in optimizers])
        changed = [ops.not_equal(a, b) for a, b in zip(after, before, strict=True)]
        restore_if(functools.reduce(ops.logical_or, changed), variables, saved)
        return transaction.logs(logs)

    return step
