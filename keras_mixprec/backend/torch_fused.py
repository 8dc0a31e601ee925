"""torch: Adam's update on a GPU, in the one call that torch has for it.

Keras's own is a dozen multi-tensor calls and as many scalars that the host makes. The
fused one reads on the device whether to write, so that nothing has to be put back.
"""

import functools
import itertools
import math

import keras
import torch

# What Keras would do besides the update itself.
_MORE = (
    "loss_scale_factor",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "use_ema",
)


def slots_of(update):
    """Return the slots that `unless` takes to carry an `Update` out as Keras would.

    Args:
        update: `keras_mixprec.backend.update.Update`.

    Returns:
        Lists of tensors, one tensor per gradient: the means, the mean squares and, for
        `amsgrad=True`, their maxima. Empty if only Keras's own update will do.
    """
    inner, variables = update.optimizer, update.targets
    if type(inner) not in _kinds() or any(getattr(inner, name) for name in _MORE):
        return []
    if any(v.constraint or v.overwrite_with_gradient for v in variables):
        return []
    device = variables[0]._value.device
    if variables[0].value is not variables[0]._value:
        return []  # A scope would hold the new values.
    if not updates_as_keras_does(device) or inner._iterations._value.device != device:
        return []
    if len(set(map(id, variables))) < len(variables):
        return []
    inner._check_variables_are_known(variables)
    places = [inner._get_variable_index(v) for v in variables]
    kinds = [inner._momentums, inner._velocities]
    kinds += [inner._velocity_hats] if inner.amsgrad else []
    slots = [[kind[i]._value for i in places] for kind in kinds]
    tensors = itertools.chain(update.grads, (v._value for v in variables), *slots)
    return slots if all(_is_plain(t, device) for t in tensors) else []


@functools.cache
def _kinds():
    # What Keras makes of its Adam here; loaded with the first of them, not before.
    from keras.src.backend.torch.optimizers.torch_adam import Adam
    from keras.src.backend.torch.optimizers.torch_adamw import AdamW

    return Adam, AdamW


def _is_plain(tensor, device):
    return (
        # A subclass, as a distributed tensor, may not know the fused call.
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device == device
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )


@torch.no_grad()
def unless(skipped, update, slots):
    """Carry an `Update` out unless `skipped`, which only the device knows.

    The same numbers as Keras's to within rounding: torch multiplies and adds in double
    precision, and at once.

    Args:
        skipped: Bool scalar tensor.
        update: An `Update`.
        slots: What `slots_of` returned for it, not empty.
    """
    inner, variables = update.optimizer, update.targets
    rate = keras.ops.convert_to_tensor(inner.learning_rate, "float32")
    iterations = inner._iterations._value
    if inner.weight_decay is not None:
        # Times 1 is every number itself, the sign of zero included.
        decay = torch.where(skipped, 1.0, 1 - inner.weight_decay * rate)
        decayed = [v._value for v in variables if inner._use_weight_decay(v)]
        if decayed:
            torch._foreach_mul_(decayed, decay)
    means, squares, *maxima = slots
    adam_unless(
        skipped,
        [v._value for v in variables],
        update.unscale(update.grads),
        means,
        squares,
        *(maxima or [[]]),
        rate=rate,
        step=iterations + 1,
        betas=(inner.beta_1, inner.beta_2),
        epsilon=inner.epsilon,
    )
    iterations.add_(torch.logical_not(skipped))


def adam_unless(
    skipped, weights, grads, means, squares, maxima, *, rate, step, betas, epsilon
):
    """Update weights and slots as Keras's `Adam` does, unless `skipped`.

    Kingma and Ba, "Adam", 2015, in the form before section 2.1, which Keras has:
    epsilon is added to the root of the uncorrected mean square. torch adds it to the
    corrected one; so it is told that the step is infinite, where nothing is left to
    correct, and the correction goes into the learning rate.

    Args:
        skipped: Bool scalar tensor.
        weights: List of float32 tensors, as the next four.
        grads: Unscaled gradients.
        means: Running means.
        squares: Running mean squares.
        maxima: Largest mean squares so far; empty for `amsgrad=False`.
        rate: float32 scalar tensor, the learning rate.
        step: Int scalar tensor, from 1.
        betas: Two floats.
        epsilon: Float.
    """
    first, second = betas
    step = step.to(rate.dtype)
    corrected = torch.sqrt(1 - second**step) / (1 - first**step)
    torch._fused_adam_(
        weights,
        grads,
        means,
        squares,
        maxima,
        [torch.full_like(rate, math.inf)] * len(weights),
        lr=rate * corrected,
        beta1=first,
        beta2=second,
        weight_decay=0.0,
        eps=epsilon,
        amsgrad=bool(maxima),
        maximize=False,
        found_inf=skipped.to(rate.dtype),
    )


@functools.cache
@torch.no_grad()
def updates_as_keras_does(device):
    """Return whether `adam_unless` does on a device what it says: tried once.

    The call is torch's own business, and nobody promises what it makes of an infinite
    step.

    Args:
        device: `torch.device`.
    """
    if device.type != "cuda":
        return False
    # Sizes with and without a remainder take different ways through the kernel.
    return all(_same(device, maxima) for maxima in (False, True))


def _same(device, with_maxima):
    def tensors(factor):
        return [
            factor * torch.arange(1.0, n + 1, device=device) / n for n in (1, 37, 4096)
        ]

    weights, grads, means = tensors(1.0), tensors(-0.5), tensors(0.25)
    # Of the maxima some stay the largest, and some do not.
    squares, maxima = tensors(1e-3), tensors(4e-3) if with_maxima else []
    state = [*weights, *means, *squares, *maxima]
    before = [t.clone() for t in state]
    options = {
        "rate": torch.full((), 0.125, device=device),
        "step": torch.full((), 3, dtype=torch.int32, device=device),
        "betas": (0.75, 0.96875),
        "epsilon": 1e-3,
    }
    given = weights, grads, means, squares, maxima
    try:
        adam_unless(torch.ones((), dtype=torch.bool, device=device), *given, **options)
        untouched = all(map(torch.equal, state, before))
        adam_unless(torch.zeros((), dtype=torch.bool, device=device), *given, **options)
    except (RuntimeError, TypeError, AttributeError):
        return False
    expected = _by_formula(before, grads, **options)
    pairs = zip(state, expected, strict=True)
    return untouched and all(torch.allclose(t, e, 1e-4, 1e-5) for t, e in pairs)


def _by_formula(state, grads, *, rate, step, betas, epsilon):
    n, (first, second) = len(grads), betas
    weights, means, squares, maxima = (state[i : i + n] for i in range(0, 4 * n, n))
    means = [first * m + (1 - first) * g for m, g in zip(means, grads, strict=True)]
    squares = [
        second * s + (1 - second) * g * g for s, g in zip(squares, grads, strict=True)
    ]
    maxima = list(map(torch.maximum, maxima, squares)) if maxima else []
    rate = rate * math.sqrt(1 - second ** int(step)) / (1 - first ** int(step))
    weights = [
        w - rate * m / (s.sqrt() + epsilon)
        for w, m, s in zip(weights, means, maxima or squares, strict=True)
    ]
    return [*weights, *means, *squares, *maxima]
