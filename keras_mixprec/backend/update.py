"""What an optimizer asks of a backend: an update, to be carried out or not."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras


@dataclasses.dataclass
class Update:
    """One update of an optimizer.

    Args:
        grads: List of gradients of the scaled loss, `None` where there is none.
        scale: float32 scalar tensor, what they are divided by.
        unscale: Callable `(grads)`, divides them.
        apply: Callable `(unscaled gradients)`, assigns variables.
        record: Callable `(flags)`, told of each gradient whether it overflowed.
        targets: List of `keras.Variable`, that of each gradient.
        variables: List of `keras.Variable`, all that `apply` may assign.
        optimizer: The optimizer that `apply` calls.
        compilable: Callable, whether `apply` is known to compile under XLA.
        half: Callable, of each gradient whether what overflows in the update is put
            down to it: only what is float16 itself can.
    """

    grads: list
    scale: Any
    unscale: Callable
    apply: Callable
    record: Callable
    targets: list
    variables: list
    optimizer: keras.optimizers.Optimizer
    compilable: Callable
    half: Callable

    def run(self) -> None:
        """Unscale and apply."""
        self.apply(self.unscale(self.grads))
