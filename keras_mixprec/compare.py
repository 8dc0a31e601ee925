"""`compare_precision`: one model, one batch, two precisions, layer by layer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_mixprec.difference import difference
from keras_mixprec.difference import flat_floats
from keras_mixprec.layer_errors import inherited_errors
from keras_mixprec.layer_errors import own_errors
from keras_mixprec.layer_errors import total_errors
from keras_mixprec.plan import build_on
from keras_mixprec.plan import check_model
from keras_mixprec.precision_plan import check_policy
from keras_mixprec.precision_report import LayerError
from keras_mixprec.precision_report import PrecisionReport
from keras_mixprec.precisions import precisions_of
from keras_mixprec.precisions import preserved
from keras_mixprec.precisions import restore_precisions
from keras_mixprec.present import present_policy
from keras_mixprec.present import set_all
from keras_mixprec.recording import Recording
from keras_mixprec.recording import pairs
from keras_mixprec.recording import record
from keras_mixprec.trials import units
from keras_mixprec.untouched import unchanged_variables


def compare_precision(
    model: keras.Model,
    x: Any,
    reference: str = "float32",
    *,
    policy: str | None = None,
) -> PrecisionReport:
    """Compare a model in half precision with itself in float32.

    Same weights, same inputs, in inference mode, operation by operation: a compiler
    may fuse and keep more digits in between, not fewer. For each layer the error that
    it makes itself stands apart from the one that its inputs bring. Afterwards the
    model is as it was; its compiled functions were not used and stay.

    Example:

    ```python
    report = mp.compare_precision(model, x[:64])
    print(report)
    report.culprit().path
    ```

    Args:
        model: `keras.Model`.
        x: Inputs: one batch, as `model(x)` takes it.
        reference: What to compare with: `"float32"`, or another policy. Defaults to
            `"float32"`.
        policy: What to measure: `"mixed_float16"` or `"mixed_bfloat16"`, as `convert`
            would carry it out. Defaults to the precisions that the model has; to
            `"mixed_float16"` if all of it is float32.

    Returns:
        A `PrecisionReport`.

    Raises:
        TypeError: If `model` is no model.
        ValueError: If a policy is unknown.
    """
    check_model(model)
    reference = check_policy(reference)
    build_on(model, x)
    policy = _policy_to_measure(model, policy)
    layers = [p.layer for p in units(model)]
    with preserved(model), unchanged_variables(model):
        if policy is not None:
            set_all(model, policy)
        half = precisions_of(model)
        policies = {id(layer): layer.dtype_policy.name for layer in layers}
        other = record(model, x, layers)
        set_all(model, reference)
        exact = record(model, x, layers)
        both = pairs(exact, other)
        inherited = inherited_errors(both)
        restore_precisions(model, half)
        own = own_errors(both)
        used = policy or present_policy(model) or "float32"
    errors = total_errors(both), own, inherited
    return _report(model, used, reference, exact, other, policies, errors)


def agreement(reference: Any, outputs: Any) -> float | None:
    """Return the share of examples that are classified alike, `None` if none are.

    Args:
        reference: The model's outputs, exact.
        outputs: The same in another precision; NaN agrees with nothing.
    """
    votes = [
        _votes(a, b)
        for a, b in zip(flat_floats(reference), flat_floats(outputs), strict=True)
    ]
    votes = [v.ravel() for v in votes if v is not None]
    return float(np.concatenate(votes).mean()) if votes else None


def _votes(a, b):
    if a.ndim and a.shape[-1] > 1:
        # Of several NaN and numbers `argmax` takes the NaN: no agreement there.
        usable = np.isfinite(b).all(-1) | ~np.isfinite(a).all(-1)
        return (a.argmax(-1) == b.argmax(-1)) & usable
    if a.size and ((a >= 0) & (a <= 1)).all():
        return ((a > 0.5) == (b > 0.5)) & np.isfinite(b)
    return None


def _policy_to_measure(model, policy):
    if policy is not None:
        return check_policy(policy)
    return None if present_policy(model) else "mixed_float16"


def _report(model, policy, reference, exact, other, policies, errors):
    total, own, inherited = errors
    whole = difference(exact.outputs, other.outputs)
    by_layer = {id(p.layer): p for p in units(model)}
    order = dict.fromkeys(id(call.layer) for call in exact.calls)
    rows = [
        _row(by_layer[key], policies[key], total[key], own.get(key), inherited.get(key))
        for key in order
        if key in total
    ]
    return PrecisionReport(
        model.name,
        policy,
        reference,
        _samples(exact),
        whole.relative,
        whole.max_abs,
        whole.nonfinite,
        agreement(exact.outputs, other.outputs),
        rows,
    )


def _row(place, policy, total, own, inherited):
    return LayerError(
        place.path,
        type(place.layer).__name__,
        policy,
        None if own is None else own.relative,
        None if inherited is None else inherited.relative,
        total.relative,
        total.max_abs,
        total.nonfinite,
    )


def _samples(recording: Recording) -> int:
    first = keras.tree.flatten(recording.outputs)[0]
    return int(first.shape[0]) if len(first.shape) else 1
