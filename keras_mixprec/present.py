"""The precisions that a model has now: as a plan, and put aside for float32."""

from __future__ import annotations

import keras

from keras_mixprec.plan import decide
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precisions import has_float32_activations
from keras_mixprec.precisions import reset_precisions
from keras_mixprec.precisions import rows_by_layer
from keras_mixprec.precisions import set_precisions
from keras_mixprec.structure import walk


def present_plan(model: keras.Model) -> PrecisionPlan:
    """Return the plan that leaves every layer of a model in the precision it has.

    Args:
        model: The model, converted or built in mixed precision.
    """
    made = decide(model, present_policy(model) or "mixed_float16", ())
    for place, row in rows_by_layer(model, made):
        now = place.layer.dtype_policy.name
        if row.policy != now:
            row.policy = now
            row.reason = getattr(place.layer, "_mixprec_reason", None) or "as it was"
    made.activations = "float32" if has_float32_activations(model) else None
    return made


def present_policy(model: keras.Model) -> str | None:
    """Return the half policy that a model computes in, None if in none."""
    policies = [place.layer.dtype_policy.name for place in walk(model)]
    return next((policy for policy in policies if policy in HALF), None)


def set_all(model: keras.Model, policy: str) -> None:
    """Set the precisions that a model has in `policy`, whatever it has now.

    In float32 that is all layers which compute in half precision now, those that
    were built so included. To be used inside `preserved`.

    Args:
        model: The model.
        policy: `"float32"`, `"mixed_float16"` or `"mixed_bfloat16"`.
    """
    reset_precisions(model)
    for place in walk(model):
        if place.layer.dtype_policy.name in HALF:
            place.layer.dtype_policy = "float32"
    if policy != "float32":
        set_precisions(model, decide(model, policy, ()))
