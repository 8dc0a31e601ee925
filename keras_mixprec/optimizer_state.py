"""What a `LossScaleOptimizer` saves, in an order that Keras's own files begin with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING
from typing import Any

import keras
from keras import ops

if TYPE_CHECKING:
    from keras_mixprec.optimizer import LossScaleOptimizer

# `iteration`, `learning_rate`, `step_counter`, `dynamic_scale`: what Keras's wrapper
# keeps. Saved state begins with it, so that Keras's files are prefixes of ours.
_KERAS_VARIABLES = 4


def save(optimizer: LossScaleOptimizer, store: Any) -> None:
    """Write every variable to `store`, those of Keras's wrapper first.

    Args:
        optimizer: Built `LossScaleOptimizer`.
        store: Mapping to write "0", "1", ... to.
    """
    for i, variable in enumerate(_stored(optimizer)[0]):
        store[str(i)] = ops.convert_to_numpy(variable)


def load(optimizer: LossScaleOptimizer, store: Any) -> bool:
    """Read what `save`, or Keras's wrapper, wrote. Returns whether it fits.

    Args:
        optimizer: Built `LossScaleOptimizer`.
        store: Mapping from "0", "1", ... to arrays.
    """
    variables, extras = _stored(optimizer)
    stored = len(store.keys())
    if stored not in (len(variables), len(variables) - extras):
        return False
    _assign(optimizer, variables, [store[str(i)] for i in range(stored)])
    return True


def set_weights(optimizer: LossScaleOptimizer, weights: list) -> None:
    """Set all variables, or warn that the optimizer starts from scratch.

    Args:
        optimizer: Built `LossScaleOptimizer`.
        weights: List of arrays in the order of `optimizer.variables`, ours or that of
            Keras's wrapper.
    """
    variables, extras = _stored(optimizer)
    if len(weights) == len(variables):
        variables = optimizer.variables
    elif len(weights) != len(variables) - extras:
        warnings.warn(
            f"Optimizer '{optimizer.name}' starts from scratch: expected "
            f"{len(variables)} arrays (or {len(variables) - extras} of Keras's "
            f"wrapper). Received: {len(weights)}. Iterations, schedules, slots "
            "and the loss scale are lost; save as `.keras` to keep them.",
            stacklevel=3,
        )
        return
    _assign(optimizer, variables, weights)


def _stored(optimizer):
    """Return the variables in the order of files, and how many Keras has not."""
    own = optimizer._variables
    extras = own[_KERAS_VARIABLES:]
    inner = optimizer.inner_optimizer.variables
    return [*own[:_KERAS_VARIABLES], *inner, *extras], len(extras)


def _assign(optimizer, variables: list[keras.Variable], values: Iterable):
    for variable, value in zip(variables, values, strict=False):
        variable.assign(value)
    _mend(optimizer)


def _mend(optimizer):
    """Bring a scale that Keras's wrapper drove to 0, inf or NaN into bounds."""
    rule = optimizer.rule
    scale = float(ops.convert_to_numpy(optimizer.dynamic_scale))
    if scale != scale:
        scale = optimizer.initial_scale
    bounded = min(max(scale, rule.min_scale), rule.max_scale)
    optimizer.dynamic_scale.assign(bounded)
    left = int(ops.convert_to_numpy(optimizer.hysteresis_left))
    optimizer.hysteresis_left.assign(min(max(left, 1), rule.hysteresis))
