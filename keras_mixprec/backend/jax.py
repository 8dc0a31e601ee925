"""JAX: pure state in and out; `select`, so that XLA fuses and donates."""

import math

import jax
import jax.numpy as jnp
import keras

from keras_mixprec import ranges
from keras_mixprec.backend import shapes
from keras_mixprec.backend.blame import blame_loss
from keras_mixprec.backend.gradient_carrier import GradientCarrier
from keras_mixprec.backend.jax_lookups import own_lookups
from keras_mixprec.backend.jax_lookups import sums_of
from keras_mixprec.backend.jax_overflow import flags
from keras_mixprec.backend.jax_overflow import flags_by_block


def unscale(grads, scale):
    # A product instead of a quotient for each value: the same for powers of two.
    kinds = [jnp.promote_types(g.dtype, jnp.float32) for g in grads]
    by = {kind: jnp.reciprocal(scale.astype(kind)) for kind in kinds}
    return [g.astype(kind) * by[kind] for g, kind in zip(grads, kinds, strict=True)]


def assign(variables, values):
    for v, value in zip(variables, values, strict=True):
        v.assign(value.astype(v.dtype))


def reduce_gradients(grads):
    # Those of a sharded batch are global arrays: XLA has summed them.
    return grads


def commit(update):
    """Keep what an `Update` assigns only if no gradient overflowed, and record it."""
    look = flags_by_block if _fuses() else flags
    overflows = look([sums_of(g) for g in update.grads], update.scale)
    saved = [v.value for v in update.variables]
    update.run()
    new = [v.value for v in update.variables]
    for value in new:
        if value.dtype == jnp.float16:
            overflows |= ~jnp.all(jnp.isfinite(value)) & jnp.array(update.half())
    chosen = _chosen(jnp.any(overflows), update.variables, saved, new)
    for v, old, value in zip(update.variables, saved, chosen, strict=True):
        if value is not old:
            v.assign(value)
    update.record(overflows)


def _chosen(skipped, variables, old, new):
    """Return the old values of variables where `skipped`, else the new ones."""
    shared = {}
    if _fuses():
        # A barrier, or XLA would see that each is but a scalar.
        shared = {
            shape: jax.lax.optimization_barrier(jnp.broadcast_to(skipped, shape))
            for shape in shapes.shared(variables)
        }
    return [
        value
        if value is before
        else jnp.where(shared.get(tuple(v.shape), skipped), before, value)
        for v, before, value in zip(variables, old, new, strict=True)
    ]


def _fuses():
    split = keras.distribution.ModelParallel
    whole = not isinstance(keras.distribution.distribution(), split)
    return jax.default_backend() == "gpu" and whole


def wrap_train_step(transaction):
    model = transaction.model

    def step(state, data):
        whole = _fuses() and keras.distribution.distribution() is None
        with own_lookups(model, whole):
            return transacted(state, data)

    def transacted(state, data):
        if model.optimizer not in transaction.optimizers():
            return transaction.train_step(state, data)
        with transaction.requires_scaled_loss():
            logs, new = transaction.train_step(state, data)
        index = _index(model.optimizer.variables, model.optimizer.variable_counters)
        before, after = state[2][index], new[2][index]
        losses = [
            new[3][_index(model.metrics_variables, v)]
            for v in transaction.loss_variables()
        ]
        optimizer = list(new[2])
        optimizer[index] = blame_loss(losses, before, after)
        new = (new[0], new[1], optimizer, new[3])
        new = _roll_back(transaction, jnp.any(before != after), state, new)
        mapping = list(zip(model.metrics_variables, new[3], strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return transaction.logs(logs), new

    return step


def _index(variables, variable):
    return [v is variable for v in variables].index(True)


def _roll_back(transaction, skipped, old_state, new_state):
    trainable, non_trainable, optimizer, metrics = new_state
    model = transaction.model
    written = {id(v) for v in transaction.variables()}
    old = [
        before if id(v) in written else value
        for v, before, value in zip(
            model.non_trainable_variables, old_state[1], non_trainable, strict=True
        )
    ]
    non_trainable = _chosen(skipped, model.non_trainable_variables, old, non_trainable)
    metrics = _chosen(skipped, model.metrics_variables, old_state[3], metrics)
    return trainable, non_trainable, optimizer, metrics


def sees_whole_loss(model):
    # That of a sharded batch is a global array.
    return True


def is_chief(model):
    return jax.process_index() == 0


def last_notes(note):
    """Leave a note to the others; return the last one of each process, in any order.

    An empty list where there are no others.

    No collective: who has not come here yet, or never does, keeps nobody waiting.
    """
    client = jax._src.distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return []
    key = f"keras_mixprec/note/{jax.process_index()}"
    client.key_value_set(key, note, allow_overwrite=True)
    return [value for _, value in client.key_value_dir_get("keras_mixprec/note/")]


def gradients(function, variables, tensors):
    """Return the gradients of `function(tensors)` by the variables and the tensors."""

    def value(values, tensors):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            return function(tensors)

    values = [v.value for v in variables]
    return jax.grad(value, argnums=(0, 1))(values, list(tensors))


@jax.custom_jvp
def _gelu(x):
    return keras.activations.gelu(x)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    # By `erf`: the absolute error is that of float32 near 1. `erfc`, by which the
    # function is precise where it is nearly 0, takes XLA a hundred operations.
    (x,), (tangent,) = primals, tangents
    distribution = (1 + jax.lax.erf(x * math.sqrt(1 / 2))) / 2
    density = jnp.exp(-jnp.square(x) / 2) / math.sqrt(2 * math.pi)
    return _gelu(x), tangent * (distribution + x * density)


def activation(function):
    """Return what computes the same in float32, its gradient cheaper if there is such.

    For functions that are computed anew in the backward pass, and so are traced.
    """
    if function is not keras.activations.gelu:
        return function
    return lambda x: (_gelu if _is_traced(x) else function)(x)


def recomputed(function):
    """Return a function of one tensor, which alone is kept for its backward pass.

    Where it is traced: an eager call would be traced for it, each time.
    """

    def call(x):
        return (jax.checkpoint(function) if _is_traced(x) else function)(x)

    return call


def _is_traced(x):
    return isinstance(x, jax.core.Tracer)


def carrier(paths, calls, own_step=False):
    return GradientCarrier(paths, calls, _partial)


def _partial(x):
    # XLA joins reductions of one tensor in one kernel, but not those of what a Triton
    # kernel of its own wrote. Behind a barrier it cannot tell.
    found, same = ranges.partial(x, jax.lax.optimization_barrier)
    # How a tensor is split over devices is not ours to change.
    return found, same if keras.distribution.distribution() is None else x


def _devices():
    return [d for d in jax.local_devices() if d.platform != "cpu"]


def memory_info():
    stats = {str(d): d.memory_stats() or {} for d in _devices()}
    return {
        name: (s.get("bytes_in_use", 0), s.get("peak_bytes_in_use", 0))
        for name, s in stats.items()
    }


def reset_peak_memory():
    # JAX has no call for it: its peak is that of the whole process.
    return False


def accelerator():
    devices = _devices()
    if not devices:
        return None
    if devices[0].platform == "tpu":
        return "tpu", None
    versions = [getattr(d, "compute_capability", "0.0") for d in devices]
    return "gpu", min(tuple(int(n) for n in v.split(".")[:2]) for v in versions)


def xla():
    return True, "works; JAX compiles with nothing else"
