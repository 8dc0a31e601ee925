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
def overflow_flags(grads):
    present = [g for g in grads if g is not None]
    # The largest magnitude of each gradient, NaN where one is; all in one call.
    largest = torch.stack(
        [n.float() for n in torch._foreach_norm(present, float("inf"))]
    )
    bad = (~(largest <= LARGEST_GRADIENT)).to(torch.int32)
    flags = iter(bad.unbind())
    none = torch.zeros((), dtype=torch.int32, device=bad.device)
    return torch.stack([none if g is None else next(flags) for g in grads])


@torch.no_grad()
def commit(flags, grads, update, record, variables):
    """Keep what `update(grads)` assigns only if no flag is set; `record(flags)`."""
    finite = (flags == 0).all()
    half = [v for v in variables if v.dtype == "float16"]
    if half or flags.device.type != "cpu" or torch.compiler.is_compiling():
        saved = read(variables)
        update(grads)
        for v in half:
            # Weights that are float16 themselves can overflow in the update.
            finite = finite & torch.isfinite(v.value).all()
        restore_by_select(~finite, variables, saved)
    elif finite:
        # Reading a CPU tensor waits for nobody.
        update(grads)
    record(flags)


@torch.no_grad()
def read(variables):
    return [v.value.detach().clone() for v in variables]


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
            pair = (new.view(kind), old.view(kind))
            groups.setdefault(kind, []).append(pair)
    for kind, pairs in groups.items():
        new, old = zip(*pairs, strict=True)
        torch._foreach_sub_(old, new)
        torch._foreach_mul_(old, skipped.to(kind))
        torch._foreach_add_(new, old)


def _restore_if(skipped, variables, saved):
    if skipped.device.type == "cpu" and not torch.compiler.is_compiling():
        if skipped:
            for v, old in zip(variables, saved, strict=True):
                v.assign(old)
    else:
        restore_by_select(skipped, variables, saved)


def wrap_train_step(transaction):
    return stateful.wrap_train_step(transaction, read, _restore_if)


def _devices():
    return range(torch.cuda.device_count()) if torch.cuda.is_available() else ()


def memory_info():
    return {
        f"cuda:{i}": (torch.cuda.memory_allocated(i), torch.cuda.max_memory_allocated(i))
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
