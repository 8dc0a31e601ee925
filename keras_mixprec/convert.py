"""`convert`: carry a plan out, in place; `to_float32`: the way back."""

from __future__ import annotations

import copy
from typing import Any

import keras

from keras_mixprec.dry_run import dry_run as try_out
from keras_mixprec.plan import build_on
from keras_mixprec.plan import check_model
from keras_mixprec.plan import decide
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precision_plan import check_policy
from keras_mixprec.precisions import has_float32_activations
from keras_mixprec.precisions import is_converted
from keras_mixprec.precisions import reset_precisions
from keras_mixprec.precisions import rows_by_layer
from keras_mixprec.precisions import set_precisions
from keras_mixprec.recompile import recompile
from keras_mixprec.saved import forget_precisions
from keras_mixprec.saved import remember_precisions
from keras_mixprec.structure import walk


def convert(
    model: keras.Model,
    policy: str = "mixed_float16",
    keep_float32: Any = (),
    plan: PrecisionPlan | None = None,
    sample: Any = None,
    *,
    dry_run: bool = True,
    activations: str | None = None,
) -> keras.Model:
    """Convert a model to mixed precision in place; its weights stay as they are.

    A compiled model is compiled again with its own loss, metrics and optimizer, whose
    state is kept; in float16 the optimizer scales the loss from then on. Converting
    twice changes nothing.

    Args:
        model: `keras.Model`, built.
        policy: `"mixed_float16"`, `"mixed_bfloat16"` or `"float32"`. Defaults to
            `"mixed_float16"`.
        keep_float32: What else stays in float32, as for `plan`. Defaults to nothing.
        plan: The plan to carry out; an optimizer that is wrapped for it begins with
            its `initial_scale`. Defaults to `plan(model, policy, keep_float32)`.
        sample: Inputs of the model: one batch, as `model(sample)` takes it, for the
            dry run. Defaults to zeros of the input shapes.
        dry_run: Whether to run the model once in its new precisions, and keep in
            float32 what fails. A `plan` is carried out as it is, unless there is a
            sample. Defaults to `True`.
        activations: `"float32"` to compute the activation functions of half-precision
            layers in float32: product and bias in half precision, the function in
            float32, its result in half precision again. Not those of RNN cells, nor
            activations that are layers. `"half"` undoes that. Defaults to what the
            plan says, else to what the model has: `"half"` at first.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is no model, or `plan` no plan.
        ValueError: If the policy or `activations` is unknown, an entry of
            `keep_float32` matches no layer, or the plan is another model's.
    """
    check_model(model)
    policy = check_policy(policy)
    _check_activations(activations)
    if policy == "float32" and plan is None:
        return to_float32(model)
    build_on(model, sample)
    if plan is None:
        plan = decide(model, policy, keep_float32, sample)
    else:
        plan, dry_run = _checked_copy(plan), sample is not None
        rows_by_layer(model, plan)
    plan.activations = _activations(model, plan, activations)
    if dry_run and not set(HALF).isdisjoint(plan.counts()):
        try_out(model, plan, sample)
    set_precisions(model, plan)
    remember_precisions(model)
    recompile(model, plan.initial_scale)
    return model


def to_float32(model: keras.Model) -> keras.Model:
    """Undo `convert` in place: the policies and outputs that were there before.

    A model that was built in mixed precision, not converted, becomes float32.

    Args:
        model: `keras.Model`.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is no model.
    """
    check_model(model)
    layers = [place.layer for place in walk(model)]
    if not any(is_converted(layer) for layer in layers):
        for layer in layers:
            if layer.dtype_policy.name in HALF:
                layer.dtype_policy = "float32"
    reset_precisions(model)
    forget_precisions(model)
    recompile(model)
    return model


def _activations(model, plan, asked) -> str | None:
    if asked is None and plan.activations is None and has_float32_activations(model):
        return "float32"
    return plan.activations if asked is None else {"half": None}.get(asked, asked)


def _check_activations(activations: Any) -> None:
    if activations not in (None, "half", "float32"):
        raise ValueError(
            'Expected `activations` to be "float32" or "half". '
            f"Received: activations={activations!r}. Leave it out to keep them as "
            "they are."
        )


def _checked_copy(plan: Any) -> PrecisionPlan:
    if not isinstance(plan, PrecisionPlan):
        raise TypeError(
            "Expected `plan` to be a `PrecisionPlan`. "
            f"Received: plan={plan!r} (of type {type(plan)}). "
            "Make one with `plan(model)` or `PrecisionPlan.from_json`."
        )
    return copy.deepcopy(plan)
