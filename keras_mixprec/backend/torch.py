"""torch: multi-tensor calls; on an accelerator no branch ever waits for it."""

import gc

import torch

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend import stateful
from keras_mixprec.backend import torch_fused
from keras_mixprec.backend.torch_backup import read
from keras_mixprec.backend.torch_backup import restore_by_select
from keras_mixprec.backend.torch_backup import undone_if
from keras_mixprec.backend.torch_carrier import PendingCarrier


@torch.no_grad()
def unscale(grads, scale):
    if not grads:
        return []
    grads = [g if g.dtype == torch.float64 else g.float() for g in grads]
    return list(torch._foreach_mul(grads, torch.reciprocal(scale)))


@torch.no_grad()
def _flags(grads, scale):
    norms = _norms([g for g in grads if g is not None])
    if len(norms) < len(grads):
        present, none = iter(norms), torch.zeros_like(scale)
        norms = [none if g is None else next(present) for g in grads]
    limit = torch.clamp(LARGEST_NORM * scale, max=LARGEST_SCALED_NORM)
    # NaN compares false with everything.
    return ~(torch.stack(norms) <= limit)


def _norms(grads):
    if all(g.dtype != torch.float64 for g in grads):
        return torch._foreach_norm(grads, 2, torch.float32)
    kinds = [torch.promote_types(g.dtype, torch.float32) for g in grads]
    return [
        torch.linalg.vector_norm(g, dtype=kind).float()
        for g, kind in zip(grads, kinds, strict=True)
    ]


@torch.no_grad()
def assign(variables, values):
    first, *others = variables
    # Keras's own way knows whether a scope takes the value in the variable's place.
    first.assign(values[0])
    if first.value is not first._value:
        for v, value in zip(others, values[1:], strict=True):
            v.assign(value)
    else:
        torch._foreach_copy_([v._value for v in others], list(values[1:]))


def reduce_gradients(grads):
    # DistributedDataParallel has averaged them in the backward pass.
    return grads


@torch.no_grad()
def commit(update):
    """Keep what an `Update` assigns only if no gradient overflowed, and record it."""
    variables, optimizer = update.variables, update.optimizer
    flags = _flags(update.grads, update.scale)
    skipped = flags.any()
    halves = [v for v in variables if v._value.dtype is torch.float16]
    if halves or torch.compiler.is_compiling():
        saved = read(variables, optimizer)
        update.run()
        own = torch.tensor(update.half(), device=flags.device)
        for v in halves:
            flags = flags | (~torch.isfinite(v.value).all() & own)
        restore_by_select(flags.any(), variables, saved, optimizer)
    elif _free_to_read(flags):
        if not skipped:
            update.run()
    elif slots := torch_fused.slots_of(update):
        torch_fused.unless(skipped, update, slots)
        _collect_young_cycles()
    else:
        with undone_if(skipped, variables, optimizer):
            update.run()
    update.record(flags)


def _free_to_read(tensor):
    # A tensor of the CPU keeps nobody waiting; a compiled graph would break.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _collect_young_cycles():
    """Free what a forward pass of Keras's leaves behind, in a tenth of a millisecond.

    `keras.tree` makes cycles that hold the inputs of layers. Python looks for cycles
    when many objects have been made, as by Keras's own updates, but not by one call:
    then more and more activations would lie there unused.
    """
    if gc.isenabled():
        gc.collect(1)


def wrap_train_step(transaction):
    def read_state(variables):
        return read(variables, transaction)

    def restore_if(skipped, variables, saved):
        if not _free_to_read(skipped) or skipped:
            restore_by_select(skipped, variables, saved, transaction)

    return stateful.wrap_train_step(
        transaction, read_state, restore_if, sees_whole_loss
    )


def _in_group():
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def sees_whole_loss(model):
    # Each process has the loss of its own share of the batch.
    return not _in_group() or torch.distributed.get_world_size() == 1


def activation(function):
    """Return an activation function of Keras's, whose gradient costs little here."""
    return function


def recomputed(function):
    """Return the function: op by op, launches cost more than what is kept."""
    return function


def carrier(paths, calls, own_step=False):
    return PendingCarrier(paths, calls, own_step)


def is_chief(model):
    return not _in_group() or torch.distributed.get_rank() == 0


def last_notes(note):
    """Leave a note to the others; return the last one of each process, in any order.

    An empty list where there are no others.

    No collective: who has not come here yet, or never does, keeps nobody waiting.
    """
    if not _in_group() or torch.distributed.get_world_size() == 1:
        return []
    store = torch.distributed.distributed_c10d._get_default_store()
    ranks = range(torch.distributed.get_world_size())
    keys = [f"keras_mixprec/note/{rank}" for rank in ranks]
    store.set(keys[torch.distributed.get_rank()], note)
    return [store.get(key).decode() for key in keys if store.check([key])]


@torch.enable_grad()
def gradients(function, variables, tensors):
    """Return the gradients of `function(tensors)` by the variables and the tensors."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    values = [v.value for v in variables]
    value = function(tensors)
    wanted = [*values, *tensors]
    if not value.requires_grad:
        return [None] * len(values), [None] * len(tensors)
    found = list(torch.autograd.grad(value, wanted, allow_unused=True))
    return found[: len(values)], found[len(values) :]


def _devices():
    return range(torch.cuda.device_count()) if torch.cuda.is_available() else ()


def memory_info():
    return {
        f"cuda:{i}": (
            torch.cuda.memory_allocated(i),
            torch.cuda.max_memory_allocated(i),
        )
        for i in _devices()
    }


def reset_peak_memory():
    for i in _devices():
        torch.cuda.reset_peak_memory_stats(i)
    return True


def accelerator():
    if not _devices():
        return None
    return "gpu", min(torch.cuda.get_device_capability(i) for i in _devices())


def xla():
    return False, "torch has none; jit_compile=True takes torch.compile instead"
