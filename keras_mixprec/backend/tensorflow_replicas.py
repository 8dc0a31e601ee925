"""TensorFlow on several replicas: one sum, one decision, then the update.

Gradients are summed over the replicas first, and the decision is read off the sum: it
is the same everywhere, it costs no collective of its own, and no branch contains one,
so that no replica can wait for another that took the other branch.
"""

import contextlib
import functools

import tensorflow as tf


def count() -> int:
    """Return how many replicas take part in a step."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def branches_across() -> bool:
    """Return whether a branch around an update must be taken for all replicas at once.

    Of one replica too, except `OneDeviceStrategy`'s: what counts is how the strategy
    runs a replica, not how many there are.
    """
    one_device = isinstance(
        tf.distribute.get_strategy(), tf.distribute.OneDeviceStrategy
    )
    return tf.distribute.has_strategy() and not one_device


def require_one_gpu() -> None:
    """Raise a `ValueError` if this process has several, each compiled by XLA alone.

    Every optimizer of Keras then fails: it counts its steps in a variable that the
    first replica hands to the others, in a `merge_call` that XLA cannot compile.
    """
    strategy = tf.distribute.get_strategy()
    devices = strategy.extended.worker_devices
    if len(devices) > 1:
        raise ValueError(
            "XLA cannot compile what each of several GPUs runs: optimizers of Keras "
            "leave the replica to count their steps. Received: `apply()` in a function "
            f"with jit_compile=True on {len(devices)} GPUs of "
            f"{type(strategy).__name__}. Leave jit_compile=True away."
        )


def reduce_gradients(grads: list) -> list:
    """Return the gradients summed over the replicas, `None` where there is none.

    Args:
        grads: List of tensors, `IndexedSlices` or `None`, of this replica.
    """
    context = tf.distribute.get_replica_context()
    if context is None or count() == 1:
        return grads
    chosen = [i for i, g in enumerate(grads) if g is not None]
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, [grads[i] for i in chosen])
    by_index = dict(zip(chosen, total, strict=True))
    return [by_index.get(i) for i in range(len(grads))]


def commit(flags, grads, update, record, optimizer):
    """Call `update(grads)` on every replica if no flag is set, then `record(flags)`.

    Args:
        flags: Bool vector, the same on every replica.
        grads: List of gradients, already summed over the replicas.
        update: Callable `(grads)`, on one replica.
        record: Callable `(flags)`, once for all.
        optimizer: The optimizer that `update` calls.
    """

    def commit_on_all(strategy, flags, grads):
        # In the cross-replica context: a branch that calls `merge_call`, as every
        # optimizer's update does, may not be taken inside a replica.
        flags = strategy.experimental_local_results(flags)[0]
        each = strategy.extended.call_for_each_replica
        with on_reduced_gradients(optimizer):
            run = functools.partial(_run, each, update, args=(grads,))
            tf.cond(tf.reduce_any(flags), tf.no_op, run)
        record(flags)

    context = tf.distribute.get_replica_context()
    context.merge_call(commit_on_all, args=(flags, grads))


@contextlib.contextmanager
def on_reduced_gradients(optimizer):
    """Inside, `optimizer.apply` takes gradients that are summed already.

    Keras sums them last, so that it clips and accumulates each replica's own; and it
    branches inside a replica, where TensorFlow allows no `merge_call`.
    """
    optimizer._all_reduce_sum_gradients = list
    optimizer._backend_apply_gradients = functools.partial(_apply, optimizer)
    try:
        yield
    finally:
        del optimizer._all_reduce_sum_gradients
        del optimizer._backend_apply_gradients


def _apply(optimizer, grads, variables):
    # The order is that of `BaseOptimizer._backend_apply_gradients`, so that N replicas
    # do what one device does.
    if optimizer.gradient_accumulation_steps:
        _accumulate(optimizer, grads, variables)
    else:
        _step(optimizer, grads, variables)
    if not optimizer.use_ema:
        return
    optimizer._update_model_variables_moving_average(optimizer._trainable_variables)
    if optimizer.ema_overwrite_frequency:
        due = (optimizer.iterations + 1) % optimizer.ema_overwrite_frequency == 0
        _cond_on_all(due, functools.partial(_overwrite_with_average, optimizer))


def _step(optimizer, grads, variables):
    grads = optimizer._clip_gradients(grads)
    optimizer._apply_weight_decay(variables)
    optimizer._backend_update_step(grads, variables, optimizer.learning_rate)


def _accumulate(optimizer, grads, variables):
    steps = optimizer.gradient_accumulation_steps
    indices = [optimizer._get_variable_index(v) for v in variables]
    sums = [optimizer._accumulated_gradients[i] for i in indices]

    def step():
        means = [(g + s) / steps for g, s in zip(grads, sums, strict=True)]
        _step(optimizer, means, variables)
        optimizer._backend_reset_gradient_accumulators()

    add = functools.partial(
        optimizer._backend_increment_gradient_accumulators, grads, sums
    )
    _cond_on_all((optimizer._iterations + 1) % steps == 0, step, add)


def _overwrite_with_average(optimizer):
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(optimizer._trainable_variables, averages, strict=True):
        if average is not None:
            variable.assign(average)


def _cond_on_all(predicate, true_fn, false_fn=tf.no_op):
    """Take one branch on all replicas; the predicate is the same on each."""

    def branch(strategy, predicate, *branches):
        each = strategy.extended.call_for_each_replica
        run = [functools.partial(_run, each, _call, args=(b,)) for b in branches]
        tf.cond(strategy.experimental_local_results(predicate)[0], *run)

    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        run = [functools.partial(_run, f) for f in (true_fn, false_fn)]
        tf.cond(predicate, *run)
        return
    context = tf.distribute.get_replica_context()
    context.merge_call(branch, args=(predicate, true_fn, false_fn))


def _call(function):
    function()


def _run(function, *args, **kwargs):
    function(*args, **kwargs)
    return tf.no_op()
