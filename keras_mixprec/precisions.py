"""The precisions of a model's layers, as one value: read, set and put back."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import keras

from keras_mixprec.activation_cast import cast_activation
from keras_mixprec.activation_cast import uncast_activation
from keras_mixprec.output_cast import cast_outputs
from keras_mixprec.output_cast import uncast_outputs
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.rules import DERIVED
from keras_mixprec.rules import HARD_CODED
from keras_mixprec.rules import OUTPUT
from keras_mixprec.rules import USER
from keras_mixprec.structure import Place
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import walk

_ACTIVATION = "_mixprec_activation"
# What a layer remembers of its conversion: the policy it had, why its policy is not
# what the rules say, the type its outputs are cast to, and that of its activation
# function. Absent where there is none.
_NOTES = ("_mixprec_original", "_mixprec_reason", "_mixprec_cast", _ACTIVATION)


def is_converted(layer: keras.Layer) -> bool:
    """Return whether the layer's policy was set by `convert`."""
    return hasattr(layer, "_mixprec_original")


def set_precisions(model: keras.Model, plan: PrecisionPlan) -> None:
    """Give every layer of a model the policy of its row.

    Args:
        model: The model.
        plan: A plan of this model.

    Raises:
        ValueError: If the plan is another model's; nothing is changed then.
    """
    rows = rows_by_layer(model, plan)
    for place, row in rows:
        _set_policy(place.layer, row.policy)
        _note(place.layer, "_mixprec_reason", _remembered(row))
        uncast_activation(place.layer)
        if plan.activations == "float32" and row.policy in HALF:
            cast_activation(place.layer)
    reasons = {id(place.layer): row.reason for place, row in rows}
    for place, _ in rows:
        _cast_for_parent(place, reasons)


def rows_by_layer(model: keras.Model, plan: PrecisionPlan) -> list[tuple]:
    """Return the places of a model's layers with their rows of a plan.

    Raises:
        ValueError: If the plan is another model's.
    """
    places = {place.path: place for place in walk(model)}
    rows = {row.path: row for row in plan}
    odd = sorted(set(places).symmetric_difference(rows))
    if odd:
        raise ValueError(
            "Expected a plan of this model. "
            f"Received: a plan that differs in {len(odd)} paths, such as '{odd[0]}'. "
            "Make it again with `plan(model)`."
        )
    return [(place, rows[path]) for path, place in places.items()]


def reset_precisions(model: keras.Model) -> None:
    """Give every converted layer the policy it had before."""
    for place in walk(model):
        uncast_outputs(place.layer)
        uncast_activation(place.layer)
        if is_converted(place.layer):
            place.layer.dtype_policy = place.layer._mixprec_original
        for name in _NOTES:
            _note(place.layer, name, None)


def precisions_of(model: keras.Model) -> list[dict]:
    """Return what `restore_precisions` needs, as plain JSON values."""
    return [_precision(place.layer) for place in walk(model)]


def restore_precisions(model: keras.Model, saved: list[dict]) -> bool:
    """Put back what `precisions_of` read, in this model or in a copy of it.

    Layers are told apart by their order: names differ from one copy to the next.

    Args:
        model: The model.
        saved: One dict per layer.

    Returns:
        Whether the layers are the same; if not, nothing was changed, and a warning
        says what to do.
    """
    layers = [place.layer for place in walk(model)]
    if [type(x).__name__ for x in layers] != [one["class_name"] for one in saved]:
        warnings.warn(
            f"Model '{model.name}' was saved in mixed precision, but its layers are "
            "not those that were saved, so that it computes in float32 where Keras "
            "does not restore policies itself. Call `keras_mixprec.convert(model)`.",
            stacklevel=2,
        )
        return False
    for layer, one in zip(layers, saved, strict=True):
        _restore(layer, one)
    return True


def has_float32_activations(model: keras.Model) -> bool:
    """Return whether activation functions were asked to compute in float32."""
    return any(hasattr(place.layer, _ACTIVATION) for place in walk(model))


@contextlib.contextmanager
def preserved(model: keras.Model) -> Iterator[None]:
    """Put the model's precisions back at the end, whatever happens inside."""
    saved = precisions_of(model)
    try:
        yield
    finally:
        restore_precisions(model, saved)


def _precision(layer) -> dict:
    policy = layer.dtype_policy
    plain = type(policy) in (keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy)
    notes = {name: getattr(layer, name, None) for name in _NOTES}
    name = policy.name if plain else None
    return {"class_name": type(layer).__name__, "policy": name, **notes}


def _restore(layer, one) -> None:
    uncast_outputs(layer)
    uncast_activation(layer)
    if one["policy"] not in (None, layer.dtype_policy.name):
        layer.dtype_policy = one["policy"]
    for name in _NOTES:
        # Files of earlier versions lack the later notes.
        _note(layer, name, one.get(name))
    if one.get(_ACTIVATION) is not None:
        del layer._mixprec_activation
        cast_activation(layer)
    if one["_mixprec_cast"] is not None:
        del layer._mixprec_cast
        cast_outputs(layer, one["_mixprec_cast"])


def _note(layer, name, value) -> None:
    if value is not None:
        setattr(layer, name, value)
    elif hasattr(layer, name):
        delattr(layer, name)


def _remembered(row) -> str | None:
    is_news = row.policy == "float32" and row.reason not in DERIVED
    return row.reason if is_news or row.reason == USER else None


def _set_policy(layer, policy) -> None:
    if layer.dtype_policy.name == policy:
        return
    if not is_converted(layer):
        layer._mixprec_original = layer.dtype_policy.name
    layer.dtype_policy = policy


def _cast_for_parent(place: Place, reasons) -> None:
    """Let a sublayer hand on its results in the type that its parent expects.

    `x + self.sublayer(x)` in a user's `call` wants one type on both sides. Where all
    was float32 it had that; where a sublayer and its parent now differ, the
    sublayer's outputs are cast. Graphs need no such cast: each layer casts its inputs.
    """
    uncast_outputs(place.layer)
    dtype = _expected_type(place, reasons)
    if dtype not in (None, place.layer.compute_dtype):
        cast_outputs(place.layer, dtype)


def _expected_type(place, reasons) -> str | None:
    parent = place.parent
    if parent is None:
        return "float32" if graph_of(place.layer) is None else None
    if graph_of(parent.layer) is not None:
        return None
    if reasons[id(place.layer)] in (OUTPUT, HARD_CODED):
        return None
    is_ours = is_converted(place.layer) or is_converted(parent.layer)
    return parent.layer.compute_dtype if is_ours else None
