"""`plan`: decide, without changing anything, which layer computes in what."""

from __future__ import annotations

import fnmatch
from typing import Any

import keras

from keras_mixprec.advice import advise
from keras_mixprec.costs import multiply_adds
from keras_mixprec.costs import own_parameters
from keras_mixprec.dry_run import dry_run
from keras_mixprec.ids import exact_inputs
from keras_mixprec.outputs import output_sources
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import LayerPlan
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precision_plan import check_policy
from keras_mixprec.precision_plan import near_misses
from keras_mixprec.precisions import is_converted
from keras_mixprec.rules import HARD_CODED
from keras_mixprec.rules import OUTPUT
from keras_mixprec.rules import USER
from keras_mixprec.rules import float32_rule
from keras_mixprec.rules import left_alone
from keras_mixprec.structure import Place
from keras_mixprec.structure import walk
from keras_mixprec.template import hard_coded


def plan(
    model: keras.Model,
    policy: str = "mixed_float16",
    keep_float32: Any = (),
    sample: Any = None,
) -> PrecisionPlan:
    """Decide which layer of a model computes in what, and say why.

    Nothing is changed. `convert` carries the plan out.

    Args:
        model: `keras.Model`, built; or not yet, and built on the sample then.
        policy: `"mixed_float16"`, `"mixed_bfloat16"` or `"float32"`. Defaults to
            `"mixed_float16"`.
        keep_float32: What else stays in float32, with all that is inside: a layer
            path, a glob pattern, a layer class, a layer, a function of a layer that
            returns a bool, or a list of these. Defaults to nothing.
        sample: Inputs of the model: one batch, as `model(sample)` takes it, for a dry
            run. Defaults to none: then there is no dry run.

    Returns:
        A `PrecisionPlan` with one row per layer.

    Raises:
        TypeError: If `model` is no model, or an entry of `keep_float32` is none of
            the above.
        ValueError: If the policy is unknown, or an entry of `keep_float32` matches
            no layer.
    """
    check_model(model)
    policy = check_policy(policy)
    build_on(model, sample)
    made = decide(model, policy, keep_float32, sample)
    if sample is not None:
        dry_run(model, made, sample)
    advise([place.layer for place in walk(model)], made)
    return made


def build_on(model: keras.Model, sample: Any) -> None:
    """Call a model that was never built on the sample, so that all layers exist."""
    if sample is not None and not model.built:
        model(sample)


def decide(
    model: keras.Model, policy: str, keep_float32: Any, sample: Any = None
) -> PrecisionPlan:
    """Return the plan that the rules make, without dry run and advice."""
    places = list(walk(model))
    kept = _kept_by_user(places, keep_float32)
    decided = _Decisions(model, policy, kept, sample)
    return PrecisionPlan(policy, [decided.row(place) for place in places])


def check_model(model: Any) -> None:
    """Raise a TypeError unless `model` is a `keras.Model`."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected `model` to be a `keras.Model`. "
            f"Received: model={model!r} (of type {type(model)}). "
            "Pass the model itself; wrap a single layer in `keras.Sequential`."
        )


class _Decisions:
    """Decides for one layer after the other, parents before their sublayers."""

    def __init__(self, model, policy, kept, sample):
        self.policy = policy
        self.kept = kept
        self.whole = dict(kept)
        half = policy in HALF
        sources = output_sources(model, sample)
        self.whole |= dict.fromkeys(sources.whole, OUTPUT)
        self.alone = dict.fromkeys(sources.own, OUTPUT)
        self.alone |= exact_inputs(model, sample) if half else {}
        coded = hard_coded(model, policy) if half else ()
        self.alone |= dict.fromkeys(coded, HARD_CODED)

    def row(self, place: Place) -> LayerPlan:
        layer = place.layer
        return LayerPlan(
            place.path,
            type(layer).__name__,
            *self._decide(place),
            own_parameters(layer),
            multiply_adds(layer),
        )

    def _decide(self, place):
        layer = place.layer
        reason = left_alone(layer, is_converted(layer))
        if reason is not None:
            return layer.dtype_policy.name, reason
        if self.policy == "float32":
            return "float32", "asked for"
        reason = self._float32_reason(place)
        if self._is_half_by_user(layer):
            return self.policy, USER
        if reason is not None:
            return "float32", reason
        return self.policy, "half precision"

    def _is_half_by_user(self, layer):
        past = getattr(layer, "_mixprec_reason", None)
        is_half = layer.dtype_policy.name in HALF
        return past == USER and is_half and id(layer) not in self.kept

    def _float32_reason(self, place):
        """The first that answers: user, layers around it, table, own code, past."""
        layer = place.layer
        above = self.whole.get(id(place.parent.layer)) if place.parent else None
        whole = self.kept.get(id(layer)) or above or self._rule(layer)
        if whole is not None:
            self.whole[id(layer)] = whole
            return whole
        past = getattr(layer, "_mixprec_reason", None)
        return self.alone.get(id(layer)) or past

    def _rule(self, layer):
        rule = float32_rule(layer)
        return self.whole.get(id(layer)) or (None if rule is None else rule.reason)


def _kept_by_user(places: list[Place], keep_float32: Any) -> dict[int, str]:
    """Return the ids of the layers that the user keeps, with the reason."""
    single = isinstance(keep_float32, str) or callable(keep_float32)
    entries = [keep_float32] if single else list(keep_float32 or ())
    kept = {}
    for entry in entries:
        matches = _matches(entry)
        found = [place for place in places if matches(place)]
        if not found:
            raise ValueError(_no_match(entry, places))
        kept |= {id(place.layer): USER for place in found}
    return kept


def _matches(entry):
    if isinstance(entry, str):
        return lambda p: (
            p.path == entry
            or (p.parent is not None and fnmatch.fnmatchcase(p.path, entry))
        )
    if isinstance(entry, keras.Layer):
        return lambda p: p.layer is entry
    if isinstance(entry, type):
        return lambda p: isinstance(p.layer, entry)
    if callable(entry):
        return lambda p: entry(p.layer)
    raise TypeError(
        "Expected `keep_float32` to hold layer paths, glob patterns, layer classes, "
        f"layers, or functions of a layer. Received: {entry!r} (of type "
        f"{type(entry)}). Pass one of these, or a list of them."
    )


def _no_match(entry, places) -> str:
    return (
        "Expected every entry of `keep_float32` to match a layer of the model. "
        f"Received: {entry!r}. {near_misses(str(entry), [p.path for p in places])}"
    )
