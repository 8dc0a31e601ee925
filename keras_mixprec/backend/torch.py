"""torch: multi-tensor calls; on an accelerator no branch ever waits for it."""

import torch

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend import stateful
from keras_mixprec.backend.torch_carrier import PendingCarrier as carrier  # noqa: F401

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INTEGERS = set(_INTEGER.values())


@torch.no_grad()
def unscale(grads, scale):
    if not grads:
        return []
    grads = [g if g.dtype == torch.float64 else g.float() for g in grads]
    return list(torch._foreach_mul(grads, torch.reciprocal(scale)))


@torch.no_grad()
def _flags(grads, scale):
    present = [i for i, g in enumerate(grads) if g is not None]
    norms = torch._foreach_norm([grads[i] for i in present], 2, torch.float32)
    limit = torch.clamp(LARGEST_NORM * scale, max=LARGEST_SCALED_NORM)
    # NaN compares false with everything.
    bad = ~(torch.stack(norms) <= limit)
    if len(present) == len(grads):
        return bad
    flags = torch.zeros(len(grads), dtype=torch.bool, device=bad.device)
    flags[present] = bad
    return flags


def reduce_gradients(grads):
    # DistributedDataParallel has averaged them in the backward pass.
    return grads


@torch.no_grad()
def commit(grads, scale, update, record, variables, compilable, optimizer):
    """Keep what `update(grads)` assigns only if no flag is set; `record(flags)`."""
    flags = _flags(grads, scale)
    skipped = flags.any()
    half = [v for v in variables if v._value.dtype is torch.float16]
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
    """Return copies of the bit patterns, made in one call per size of element."""
    bits, groups = _bits(variables), {}
    for i, value in enumerate(bits):
        groups.setdefault(value.dtype, []).append(i)
    return [(group, _copies([bits[i] for i in group])) for group in groups.values()]


def _copies(values):
    integer = values[0].dtype in _INTEGERS
    return torch._foreach_add(values, 0) if integer else [v.clone() for v in values]


@torch.no_grad()
def restore_by_select(skipped, variables, saved):
    """Write the saved values back where `skipped`, in three calls per size.

    new += (old - new) * skipped, on the bit patterns as integers: exact for every
    bit, NaN and the sign of zero included, and without asking what `skipped` is.
    """
    bits = _bits(variables)
    for members, old in saved:
        new = [bits[i] for i in members]
        if new[0].dtype in _INTEGERS:
            torch._foreach_sub_(old, new)
            torch._foreach_mul_(old, skipped.to(new[0].dtype))
            torch._foreach_add_(new, old)
        else:
            for n, o in zip(new, old, strict=True):
                n.copy_(torch.where(skipped, o, n))


def _bits(variables):
    """Return each variable's memory as integers, where a type of that size exists."""
    # A scope may hold other values in the variables' place; then it does for all.
    if variables and variables[0].value is not variables[0]._value:
        return [_view(v.value) for v in variables]
    return [_kept_view(v) for v in variables]


def _kept_view(variable):
    # A view takes the host longer to make than a kernel to launch.
    value = variable._value
    kept = getattr(variable, "_mixprec_view", None)
    if kept is None or kept[0] is not value:
        kept = variable._mixprec_view = value, _view(value)
    return kept[1]


def _view(value):
    value = value.detach()
    kind = _INTEGER.get(value.element_size())
    return value if kind is None else value.view(kind)


def _restore_if(skipped, variables, saved):
    if not _free_to_read(skipped) or skipped:
        restore_by_select(skipped, variables, saved)


def wrap_train_step(transaction):
    return stateful.wrap_train_step(transaction, read, _restore_if)


def is_chief(model):
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    return not joined or distributed.get_rank() == 0


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
