"""Overflow counts in words: which layers, and what to do about them."""

import keras

from keras_mixprec.loss_scale import LossScaleRule
from keras_mixprec.structure import walk

_NAMED_LAYERS = 3


def overflowing_layers(model: keras.Model, counts: dict[str, int]) -> dict[str, int]:
    """Return layer path -> steps in which its gradients overflowed, from the loss back.

    Backward, an overflow spreads from where it starts to all layers before it. Of the
    layers, the last that the model lists is taken as the nearest to the loss.

    Args:
        model: The model that was trained.
        counts: Variable path -> count, as `LossScaleOptimizer.overflow_counts`.

    Returns:
        A dict without the layers that never overflowed; paths as in `mp.plan`.
    """
    owners = {
        variable.path: place.path
        for place in walk(model)
        for variable in place.layer._trainable_variables
    }
    layers: dict[str, int] = {}
    for path, count in reversed(counts.items()):
        layer = owners.get(path, path)
        layers[layer] = max(count, layers.get(layer, 0))
    return {layer: count for layer, count in layers.items() if count}


def describe_layers(layers: dict[str, int], when: str = "since training began") -> str:
    """Return a sentence that names the first of `overflowing_layers`.

    Args:
        layers: What `overflowing_layers` returned.
        when: String, the time that was counted.
    """
    if not layers:
        return f"No layer overflowed {when}."
    named = [f"'{n}' ({count})" for n, count in [*layers.items()][:_NAMED_LAYERS]]
    more = len(layers) - len(named)
    return (
        f"Layers whose gradients overflowed {when}, nearest the loss "
        f"first: {', '.join(named)}{f' and {more} more' if more else ''}."
    )


def remedies_for_falling(layers: dict[str, int]) -> tuple[str, str, str]:
    """Return the likeliest remedies for a loss scale that only falls.

    Args:
        layers: What `overflowing_layers` returned.
    """
    return (
        "look for NaN, inf or outliers in the data: one such value makes a whole "
        "step overflow at any scale.",
        "lower the learning rate, or warm it up, if the loss grew before this.",
        f"{_keep_float32(layers)}, or use 'mixed_bfloat16', whose range is float32's.",
    )


def remedies_for_thrashing(
    layers: dict[str, int], rule: LossScaleRule, scale: float
) -> tuple[str, str, str]:
    """Return the likeliest remedies for a loss scale that grows in vain.

    Args:
        layers: What `overflowing_layers` returned.
        rule: The optimizer's rule.
        scale: Float, the present loss scale.
    """
    return (
        "let the scale grow more rarely with `dynamic_growth_steps=2000` (it is "
        f"{rule.growth_steps}).",
        f"stop it below where it overflows with `max_scale={scale:g}`.",
        f"{_keep_float32(layers)}.",
    )


def _keep_float32(layers):
    nearest = next(iter(layers), "...")
    return f"keep that layer exact: `mp.convert(model, keep_float32=['{nearest}'])`"
