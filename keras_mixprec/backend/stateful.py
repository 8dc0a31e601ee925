"""The train step as a transaction, for the two backends that assign in place."""

import functools

from keras import ops

from keras_mixprec.backend.blame import blame_loss


def wrap_train_step(transaction, read, restore_if, sees_whole_loss):
    """Return the train step with everything but the seeds rolled back on overflow.

    Args:
        transaction: `keras_mixprec.transaction.Transaction`.
        read: Callable `list of variables -> copies` that a later assignment leaves
            alone.
        restore_if: Callable `(skipped, variables, saved)`, assigns the saved values
            back where `skipped` is true.
        sees_whole_loss: Callable `(model)`, whether the loss that this step sees is
            that of all replicas.
    """

    def step(data):
        optimizers = transaction.optimizers()
        if not optimizers:
            return transaction.train_step(data)
        variables = transaction.state()
        saved = read(variables)
        before = {id(o): _counters(o) for o in optimizers}
        with transaction.requires_scaled_loss():
            logs = transaction.train_step(data)
        built = [o for o in optimizers if o.built]
        if not built:
            return logs
        changed = [
            ops.any(ops.not_equal(o.variable_counters, before[id(o)])) for o in built
        ]
        if sees_whole_loss(transaction.model):
            # Before the losses are rolled back, and with them what they were.
            losses = [v.value for v in transaction.loss_variables()]
            for o in built:
                o.variable_counters.assign(
                    blame_loss(losses, before[id(o)], o.variable_counters.value)
                )
        restore_if(functools.reduce(ops.logical_or, changed), variables, saved)
        return transaction.logs(logs)

    return step


def _counters(optimizer):
    # A sum, because a later assignment would show in the variable's own tensor. An
    # optimizer that nobody has used yet has skipped nothing.
    return optimizer.variable_counters.value + 0 if optimizer.built else 0
