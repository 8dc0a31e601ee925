"""Which layers a model hard-codes to float32, learnt from a second copy of them.

A layer that was built in float32 does not tell whether it was asked to, or only
followed the default. So its config is built again under the half policy, without
weights, and thrown away: what is float32 there is so by its author's will.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import warnings
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state

from keras_mixprec.structure import is_builtin
from keras_mixprec.structure import walk


def hard_coded(model: keras.Model, policy: str) -> set[int]:
    """Return the ids of the layers that stay float32 under a policy.

    Args:
        model: The model.
        policy: Name of the half policy.
    """
    found: set[int] = set()
    seen: set[int] = set()
    known: dict[str, list | None] = {}
    for place in walk(model):
        layer = place.layer
        if id(layer) in seen or is_builtin(layer):
            continue
        inside = [below.layer for below in walk(layer)]
        flags = _flags(layer, inside, policy, known)
        if flags is not None:
            seen |= {id(x) for x in inside}
            found |= {id(x) for x, flag in zip(inside, flags, strict=True) if flag}
    return found


def _flags(layer, inside, policy, known) -> list[bool] | None:
    """Return which layers of a second copy are float32, None if there is no copy."""
    try:
        config = _in_policy(layer.get_config(), policy)
        unnamed = {k: v for k, v in config.items() if k != "name"}
        key = f"{type(layer)} {json.dumps(unnamed, sort_keys=True, default=repr)}"
        if key not in known:
            known[key] = _build(type(layer), config, layer.get_build_config(), policy)
    except Exception:  # No config, or one that does not lead back to the layer.
        return None
    copied = known[key] or []
    if [name for name, _ in copied] != [type(x).__name__ for x in inside]:
        return None
    return [is_float32 for _, is_float32 in copied]


def _build(layer_class, config, build_config, policy) -> list[tuple[str, bool]]:
    with _without_a_trace(), keras.StatelessScope(initialize_variables=False):
        keras.config.set_dtype_policy(policy)
        second = layer_class.from_config(config)
        if build_config and not second.built:
            second.build_from_config(build_config)
    layers = [place.layer for place in walk(second)]
    return [(type(x).__name__, x.dtype_policy.name == "float32") for x in layers]


def _in_policy(config, policy):
    """Return a config in which every policy that is plain float32 is another."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            is_plain = config["config"] == {"name": "float32"}
            return {**config, "config": {"name": policy}} if is_plain else config
        items = config.items()
        return {
            k: policy if k == "dtype" and v == "float32" else _in_policy(v, policy)
            for k, v in items
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_in_policy(x, policy) for x in config)
    return config


_GLOBALS = ("uninitialized_variables", "object_name_uids")


@contextlib.contextmanager
def _without_a_trace() -> Iterator[None]:
    """Put back what building a layer leaves behind: policy, names, seeds."""
    policy, state = keras.config.dtype_policy(), random.getstate()
    before = {n: copy.copy(global_state.get_global_attribute(n)) for n in _GLOBALS}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        keras.config.set_dtype_policy(policy)
        random.setstate(state)
        for name, value in before.items():
            global_state.set_global_attribute(name, value)
