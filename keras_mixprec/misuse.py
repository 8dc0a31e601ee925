"""Calls of a `LossScaleOptimizer` that would train wrongly in silence raise instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_mixprec.overflow_counters import path_of

if TYPE_CHECKING:
    from keras_mixprec.optimizer import LossScaleOptimizer


def check_has_variables(optimizer: LossScaleOptimizer, variables: list | None) -> None:
    """Raise if `apply` got no variables, and has none of its own.

    Args:
        optimizer: The optimizer.
        variables: What `apply` got for them.
    """
    if variables is None and not optimizer.built:
        raise ValueError(
            "`apply()` without variables needs a built optimizer. Received: "
            "trainable_variables=None. Pass them, or call "
            "`optimizer.build(trainable_variables)` first."
        )


def check_same_length(grads: list, variables: list) -> None:
    """Raise unless there is one variable for each gradient.

    Args:
        grads: List of gradients.
        variables: List of variables.
    """
    if len(variables) != len(grads):
        raise ValueError(
            "`grads` and `trainable_variables` must have the same length. "
            f"Received: {len(grads)} gradients for {len(variables)} variables."
        )


def check_any_gradient(grads: list) -> None:
    """Raise if there is no gradient at all, in Keras's words.

    Args:
        grads: List of gradients, `None` where there is none.
    """
    if all(g is None for g in grads):
        raise ValueError("No gradients provided for any variable.")


def check_loss_was_scaled(optimizer: LossScaleOptimizer, variables: list) -> None:
    """Raise if gradients are divided by the scale that were never multiplied by it.

    Args:
        optimizer: The optimizer.
        variables: List of the variables that the gradients are of.
    """
    # A variable of a layer has a path below the layer's; gradients for others
    # may come from anywhere.
    if optimizer._loss_was_scaled:
        return
    of_a_model = any("/" in path_of(v) for v in variables)
    if not (optimizer._in_transaction or of_a_model):
        return
    raise ValueError(
        f"`apply()` divides the gradients by the loss scale, but '{optimizer.name}' "
        "has not scaled a loss. Received: gradients of an unscaled loss, which "
        f"would become {optimizer.initial_scale:g} times too small. Add "
        "`loss = optimizer.scale_loss(loss)` before the gradients are taken "
        "(JAX: `optimizer.stateless_scale_loss(optimizer_variables, loss)`)."
    )


def check_stateless(optimizer: LossScaleOptimizer, optimizer_variables: list) -> None:
    """Raise unless there is one value for each variable of a built optimizer.

    Args:
        optimizer: The optimizer.
        optimizer_variables: List of tensors.
    """
    if not optimizer.built or len(optimizer_variables) != len(optimizer.variables):
        expected = (
            len(optimizer.variables) if optimizer.built else "a built optimizer's"
        )
        raise ValueError(
            f"`optimizer_variables` must hold {expected} values, one for each of "
            f"`optimizer.variables`. Received: {len(optimizer_variables)} values "
            f"and built={optimizer.built}. Call "
            "`optimizer.build(model.trainable_variables)` first."
        )
