"""The rules: what stays in float32, and why. One table, read from the top."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import keras

from keras_mixprec.structure import is_builtin

LARGEST_FLOAT16 = 65504.0
SMALLEST_FLOAT16 = 2.0**-24
MANY_STEPS = 1000
LARGE_WINDOW = 64
INPUT_IDS = "input ids"
RAW_INPUTS = "its inputs are raw data"
OUTPUT = "output layer"
HARD_CODED = "hard-coded by its model"
USER = "user"
CUBIC = ("bicubic", "lanczos3", "lanczos5")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        reason: What the plan says of a layer that the rule keeps, with all inside it.
        applies: Function of a layer: whether the rule keeps it.
    """

    reason: str
    applies: Callable[[keras.Layer], bool]


def named(*names: str, also: Callable[[keras.Layer], bool] | None = None):
    """Return a condition: the layer's class, or a base of it, has one of the names.

    By name, so that libraries of layers need not be imported to be known.
    """

    def applies(layer):
        bases = {b.__name__ for b in type(layer).__mro__ if not _is_backend(b)}
        return not bases.isdisjoint(names) and (also is None or also(layer))

    return applies


def _is_backend(base) -> bool:
    return base.__module__.startswith("keras.src.backend.")


def _window(layer) -> int:
    size = getattr(layer, "pool_size", 1)
    return math.prod(size) if isinstance(size, (tuple, list)) else size


def _has_activation(layer) -> bool:
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", "") in ("sparsemax", "squareplus")


def _is_unscaled(layer) -> bool:
    if getattr(layer, "score_mode", None) != "dot":
        return False
    return not layer.use_scale


def _has_many_steps(layer) -> bool:
    shapes = layer._build_shapes_dict or {}
    shape = next(iter(shapes.values()), None) or ()
    return len(shape) > 1 and isinstance(shape[1], int) and shape[1] >= MANY_STEPS


def _has_float32_cell(layer) -> bool:
    cells = layer._layers
    return any(is_builtin(cell) and float32_rule(cell) for cell in cells)


# Measured case by case: inf or NaN in float16 where float32 is finite, unless the
# reason says otherwise. BatchNormalization, LayerNormalization, RMSNormalization,
# GroupNormalization, Softmax and GlobalAveragePooling2D are not here on purpose:
# Keras computes them in float32 inside, whatever their policy.
RULES = (
    Rule("statistics of raw data", named("Normalization")),
    Rule("scales raw data", named("Rescaling")),
    Rule(
        INPUT_IDS,
        named(
            "CategoryEncoding",
            "Discretization",
            "Hashing",
            "HashedCrossing",
            "IndexLookup",
            "TextVectorization",
        ),
    ),
    Rule("compares exact values", named("Masking")),
    Rule("squares vanish or overflow in float16", named("UnitNormalization")),
    Rule(
        "squares vanish or overflow in float16",
        named("Dot", also=lambda layer: getattr(layer, "normalize", False)),
    ),
    Rule("writes its kernel back rounded", named("SpectralNormalization")),
    Rule("logits without a scale overflow", named("Attention", also=_is_unscaled)),
    Rule("logits without a scale overflow", named("T5MultiHeadAttention")),
    Rule("squares vanish or overflow in float16", named("T5LayerNorm")),
    Rule("wavelengths beyond float16", named("SinePositionEncoding")),
    Rule(
        "reduces in float16",
        named("GlobalAveragePooling1D", "BaseAdaptiveAveragePooling"),
    ),
    Rule(
        "reduces in float16",
        named(
            "AveragePooling1D",
            "AveragePooling2D",
            "AveragePooling3D",
            also=lambda layer: _window(layer) >= LARGE_WINDOW,
        ),
    ),
    Rule(
        "activity regularizer sums in float16",
        lambda layer: layer.activity_regularizer is not None,
    ),
    Rule(
        "bicubic has no float16 gradient",
        named(
            "Resizing",
            "UpSampling2D",
            also=lambda layer: getattr(layer, "interpolation", "") in CUBIC,
        ),
    ),
    Rule(
        "augments raw images",
        named(
            "BaseImagePreprocessingLayer",
            "Pipeline",
            also=lambda layer: type(layer).__name__ not in ("Resizing", "CenterCrop"),
        ),
    ),
    Rule("log of a spectrum overflows", named("MelSpectrogram", "STFTSpectrogram")),
    Rule("activation loses its threshold in float16", _has_activation),
    Rule(
        f"accumulates state over {MANY_STEPS} steps or more",
        named("RNN", "ConvRNN", also=_has_many_steps),
    ),
    Rule("its cell stays in float32", named("RNN", also=_has_float32_cell)),
    Rule(
        "runs foreign code",
        named("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"),
    ),
)

# Reasons that come out the same whenever a plan is made; the others, such as the
# user's and the dry run's, are remembered by the layer.
DERIVED = {rule.reason for rule in RULES} | {INPUT_IDS, RAW_INPUTS, OUTPUT, HARD_CODED}

MOVES_VALUES = named(
    "Concatenate",
    "Cropping1D",
    "Cropping2D",
    "Cropping3D",
    "BaseDropout",
    "Dropout",
    "Flatten",
    "Identity",
    "Permute",
    "RepeatVector",
    "Reshape",
    "ZeroPadding1D",
    "ZeroPadding2D",
    "ZeroPadding3D",
)


def float32_rule(layer: keras.Layer) -> Rule | None:
    """Return the first rule of the table that keeps the layer in float32."""
    return next((rule for rule in RULES if rule.applies(layer)), None)


def left_alone(layer: keras.Layer, converted: bool) -> str | None:
    """Return why a layer's policy is not ours to change, or None if it is.

    Args:
        layer: The layer.
        converted: Whether its policy is one that `convert` has set.
    """
    policy = layer.dtype_policy
    if isinstance(layer, keras.layers.InputLayer):
        return "input"
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return "has a policy map"
    if policy.quantization_mode is not None:
        return f"quantized to {policy.quantization_mode}"
    if converted or policy.name == "float32":
        return None
    if policy.name in ("mixed_float16", "mixed_bfloat16"):
        return f"already {policy.compute_dtype}"
    return f"already {policy.name}"


reads_raw_data = named(
    "Normalization", "Rescaling", "Discretization", "HashedCrossing", "IndexLookup"
)


def takes_ids(layer: keras.Layer) -> bool:
    """Return whether the layer, or a layer inside it, reads its input as ids."""
    return any(isinstance(x, keras.layers.Embedding) for x in layer._flatten_layers())


# Their own numbers never meet float16: Keras casts to float32 inside.
COMPUTES_IN_FLOAT32 = named(
    "BatchNormalization",
    "GroupNormalization",
    "LayerNormalization",
    "RMSNormalization",
)
