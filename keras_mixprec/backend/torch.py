"""torch: multi-tensor calls; on an accelerator no branch ever waits for it."""

import torch

from keras_mixprec.backend import LARGEST_GRADIENT
from keras_mixprec.backend import stateful

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def unscale(grads, scale):
    if not grads:
        return []
    grads = [g if g.dtype == torch.float64 else g.float() for g in grads]
    return list(torch._foreach_mul(grads, torch.reciprocal(scale)))


@torch.no_grad()
def overflow_flags(grads, scale):
    present = [i for i, g in enumerate(grads) if g is not None]
    # The largest magnitude of each gradient, NaN where one is; all in one call.
    norms = torch._foreach_norm([grads[i] for i in present], float("inf"))
    largest = torch.stack([n.float() for n in norms])
    bad = ~(largest <= LARGEST_GRADIENT * scale)
    if len(present) == len(grads):
        return bad
    flags = torch.zeros(len(grads), dtype=torch.bool, device=bad.device)
    flags[present] = bad
    return flags


@torch.no_grad()
def commit(prepare, update, record, variables, compilable):
    """Keep what `update(grads)` assigns only if no flag is set; `record(flags)`."""
    flags, grads = prepare()
    skipped = flags.any()
    half = [v for v in variables if v.dtype == "float16"]
    if half or not _free_to_read(flags):
        saved = read(variables)
        update(grads)
        for v in half:
            # Weights that are float16 themselves can overflow in the update.
            skipped = skipped | ~torch.isfinite(v.value).all()
        restore_by_select(skipped, variables, saved)
    elif not skipped:
        update(grads)
    record(flags)


def _free_to_read(tensor):
    # A tensor of the CPU keeps nobody waiting; a compiled graph would break.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def read(variables):
    values = [v.value.detach() for v in variables]
    kinds = [_INTEGER.get(v.element_size()) for v in values]
    copies = [None] * len(values)
    for kind in set(kinds):
        members = [i for i, k in enumerate(kinds) if k is kind]
        for i, copy in zip(members, _copy(values, members, kind), strict=True):
            copies[i] = copy
    return copies


def _copy(values, members, kind):
    if kind is None:
        return [values[i].clone() for i in members]
    # On the bit patterns, in one call.
    return torch._foreach_add([values[i].view(kind) for i in members], 0)


@torch.no_grad()
def restore_by_select(skipped, variables, saved):
    """Write the saved values back where `skipped`, in three calls per dtype.

    new += (old - new) * skipped, on the bit patterns as integers: exact for every
    bit, NaN and the sign of zero included, and without asking what `skipped` is.
    """
    groups = {}
    for v, old in zip(variables, saved, strict=True):
        new = v.value.detach()
        kind = _INTEGER.get(new.element_size())
        if kind is None:
            new.copy_(torch.where(skipped, old, new))
        else:
            groups.setdefault(kind, []).append((new.view(kind), old))
    for kind, pairs in groups.items():
        new, old = zip(*pairs, strict=True)
        torch._foreach_sub_(old, new)
        torch._foreach_mul_(old, skipped.to(kind))
        torch._foreach_add_(new, old)


def _restore_if(skipped, variables, saved):
    if not _free_to_read(skipped):
        restore_by_select(skipped, variables, saved)
    elif skipped:
        for v, old in zip(variables, saved, strict=True):
            v.assign(old.view(v.value.dtype))


def wrap_train_step(transaction):
    return stateful.wrap_train_step(transaction, read, _restore_if)


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
