"""Overflows in words: where they began, and what to do about them."""

from keras_mixprec.attribution import Attribution
from keras_mixprec.loss_scale import LossScaleRule

_NAMED_LAYERS = 3


def describe(attribution: Attribution, when: str = "since training began") -> str:
    """Return in words where overflows began.

    Args:
        attribution: What was counted.
        when: String, the time that was counted.
    """
    if not attribution.steps:
        return f"No layer overflowed {when}."
    n = attribution.steps
    parts = [f"{n} {'step' if n == 1 else 'steps'} overflowed {when}"]
    parts += _in_the_loss(attribution, n) + _in_layers(attribution.began)
    return "; ".join(parts) + "."


def _in_the_loss(attribution, steps):
    losses = attribution.nonfinite_loss
    if losses is None:
        return ["whether the loss itself was finite is not known"]
    if not losses:
        return ["the loss itself was finite"]
    which = "all of them" if losses == steps else f"{losses} of them"
    return [
        f"in {'it' if steps == 1 else which} the loss itself was not finite already: "
        "the forward pass overflowed, or the data are not finite "
        "(`mp.OverflowInspector()` names the layer)"
    ]


def _in_layers(began):
    if not began:
        return []
    named = [f"'{path}' ({n})" for path, n in [*began.items()][:_NAMED_LAYERS]]
    more = len(began) - len(named)
    return [
        "gradients began to overflow, nearest the loss first, in "
        f"{', '.join(named)}{f' and {more} more' if more else ''}"
    ]


def remedies_for_falling(attribution: Attribution) -> tuple[str, str, str]:
    """Return the likeliest remedies for a loss scale that only falls.

    Args:
        attribution: Where the overflows began.
    """
    return (
        "look for NaN, inf or outliers in the data: one such value makes a whole "
        "step overflow at any scale.",
        "lower the learning rate, or warm it up, if the loss grew before this.",
        f"{keep_float32(attribution)}, or use 'mixed_bfloat16', whose range is "
        "float32's.",
    )


def remedies_for_thrashing(
    attribution: Attribution, rule: LossScaleRule, scale: float
) -> tuple[str, str, str]:
    """Return the likeliest remedies for a loss scale that grows in vain.

    Args:
        attribution: Where the overflows began.
        rule: The optimizer's rule.
        scale: Float, the present loss scale.
    """
    return (
        "let the scale grow more rarely with `dynamic_growth_steps=2000` (it is "
        f"{rule.growth_steps}).",
        f"stop it below where it overflows with `max_scale={scale:g}`.",
        f"{keep_float32(attribution)}.",
    )


def keep_float32(attribution: Attribution) -> str:
    """Return the remedy that keeps float32 where most overflows began.

    Args:
        attribution: Where the overflows began.
    """
    began, losses = attribution.began, attribution.nonfinite_loss or 0
    if losses > sum(began.values()):
        return (
            "keep the layer that `mp.OverflowInspector()` names exact: "
            "`mp.convert(model, keep_float32=[...])`"
        )
    most = max(began, key=began.get, default="...")
    return f"keep that layer exact: `mp.convert(model, keep_float32=['{most}'])`"
