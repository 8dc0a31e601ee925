"""Advice in a plan: what costs speed or range in half precision. Never an error."""

from __future__ import annotations

import keras

from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.rules import COMPUTES_IN_FLOAT32
from keras_mixprec.rules import INPUT_IDS
from keras_mixprec.rules import LARGEST_FLOAT16
from keras_mixprec.rules import SMALLEST_FLOAT16

_TILE = 8
_DOMINANT = 0.25


def advise(layers: list[keras.Layer], plan: PrecisionPlan) -> None:
    """Add advice to the rows of a plan, in place.

    Args:
        layers: The layers, in the order of the rows.
        plan: The plan.
    """
    total = sum(row.multiply_adds for row in plan)
    for layer, row in zip(layers, plan, strict=True):
        if row.policy in HALF:
            row.advice += _odd_sizes(layer)
        if row.policy == "mixed_float16" and not COMPUTES_IN_FLOAT32(layer):
            row.advice += _constants(layer)
        if row.policy == "float32" and row.multiply_adds > _DOMINANT * total:
            share = row.multiply_adds / total
            row.advice.append(f"holds {share:.0%} of all multiply-adds in float32")
        if row.policy == "float64":
            row.advice.append("float64 is slow on every accelerator: use float32")
        if row.reason == INPUT_IDS and isinstance(layer, keras.layers.Embedding):
            row.advice.append("ids arrive as floats: pass integers instead")


def _odd_sizes(layer) -> list[str]:
    """Tensor cores want multiples of 8 (NVIDIA, Train With Mixed Precision)."""
    kernels = [v for v in layer._trainable_variables if len(v.shape) > 1]
    if not kernels or isinstance(layer, keras.layers.Embedding):
        return []
    odd = [size for size in kernels[0].shape[-2:] if size % _TILE]
    if not odd:
        return []
    sizes = " and ".join(str(size) for size in odd)
    return [f"dimension {sizes} of its kernel is not a multiple of {_TILE}"]


def _constants(layer) -> list[str]:
    """Numbers of a layer that float16 turns into 0 or inf."""
    numbers = {k: v for k, v in vars(layer).items() if isinstance(v, float)}
    return [
        f"{name}={value:g} is {'0' if abs(value) < 1 else 'inf'} in float16"
        for name, value in numbers.items()
        if 0 < abs(value) < SMALLEST_FLOAT16 or abs(value) > LARGEST_FLOAT16
    ]
