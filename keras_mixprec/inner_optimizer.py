"""What may be wrapped in a `LossScaleOptimizer`."""

import warnings

import keras


def bare_optimizer(
    optimizer: keras.optimizers.Optimizer | str | dict,
) -> keras.optimizers.Optimizer:
    """Return the optimizer that is meant.

    Args:
        optimizer: `keras.optimizers.Optimizer`, its name, or its config.

    Raises:
        ValueError: If it scales the loss already, or is no optimizer.
    """
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "`inner_optimizer` must be an optimizer that does not scale the loss "
            f"already. Received: inner_optimizer={optimizer.name} (a "
            f"{type(optimizer).__name__}). Pass its `inner_optimizer` instead."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`inner_optimizer` must be a `keras.optimizers.Optimizer`, its name or "
            f"its config. Received: inner_optimizer={optimizer!r}. "
            'Pass for example "adam".'
        )
    return optimizer


def warn_about_inner_scale(inner: keras.optimizers.Optimizer) -> None:
    """Warn of a `loss_scale_factor` that has no effect inside a wrapper.

    Args:
        inner: The wrapped optimizer.
    """
    if inner.loss_scale_factor is not None:
        warnings.warn(
            f"`loss_scale_factor={inner.loss_scale_factor}` of the inner optimizer "
            f"'{inner.name}' is ignored: the wrapper scales the loss. For a fixed "
            "scale, pass it as `initial_scale` with `growth_factor=1.0, "
            "backoff_factor=1.0`.",
            stacklevel=3,
        )


def is_keras_own(optimizer: keras.optimizers.Optimizer, variables: list) -> bool:
    """Return whether nobody but Keras wrote what runs in an update.

    Keras's own updates are known to compile under XLA; others may call Python.

    Args:
        optimizer: The inner optimizer.
        variables: List of `keras.Variable`, the trainable variables.
    """
    parts = [optimizer, optimizer._learning_rate, *(v.constraint for v in variables)]
    return all(p is None or type(p).__module__.split(".")[0] == "keras" for p in parts)
