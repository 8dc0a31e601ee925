"""The loss times the loss scale, and the gradients divided by it."""

import contextlib
from typing import Any

import keras
from keras import ops

from keras_mixprec.backend import engine
from keras_mixprec.misuse import check_stateless


class ScaledLoss:
    """What a `LossScaleOptimizer` does to losses and gradients.

    Apart from it for the reader alone; users call all of this on the optimizer.
    """

    # Known while a step is traced, not while it runs.
    _loss_was_scaled = False
    _gradients_were_unscaled = False
    _in_transaction = False

    @property
    def loss_scale(self) -> Any:
        """The present loss scale: float32 scalar tensor, usable inside a graph.

        Multiplying a loss by it counts as scaling that loss. Inside `fit` on JAX it
        is what the last synchronisation saw, as every optimizer variable there.
        """
        self._loss_was_scaled = True
        # Not the variable itself, which torch would go on changing.
        return self._scale() * 1.0

    def _scale(self):
        scale = self.dynamic_scale if self.built else self.initial_scale
        return ops.convert_to_tensor(scale, "float32")

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss times the loss scale, in float32 at least.

        Args:
            loss: Scalar tensor of any float dtype.
        """
        self._loss_was_scaled = True
        if keras.backend.is_keras_tensor(loss) or hasattr(loss, "dtype"):
            loss = _widen(loss)
        scale = self.dynamic_scale if self.built else self.initial_scale
        return ops.multiply(loss, scale)

    def get_scaled_loss(self, loss: Any) -> Any:
        """Return the scaled loss: tf.keras's name for `scale_loss`.

        Args:
            loss: Scalar tensor, or a callable that returns one.
        """
        if callable(loss):
            return lambda: self.scale_loss(loss())
        return self.scale_loss(loss)

    def get_unscaled_gradients(self, grads: list) -> list:
        """Return gradients divided by the loss scale, as tf.keras did.

        The next `apply` or `apply_gradients` takes its gradients as unscaled.

        Args:
            grads: List of gradients of the scaled loss, or `None` where there is none.
        """
        unscaled = self._unscale(grads, [None] * len(grads))
        self._gradients_were_unscaled = True
        return unscaled

    def stateless_scale_loss(self, optimizer_variables: list, loss: Any) -> Any:
        """Return the scaled loss, with the scale taken from the state passed in.

        `scale_loss` inside a function that JAX compiles is the scale of the moment
        of tracing, for ever; this is the scale of the step.

        Args:
            optimizer_variables: List of tensors, the values of `self.variables`.
            loss: Scalar tensor.

        Raises:
            ValueError: If the optimizer is not built, or the list does not fit.
        """
        check_stateless(self, optimizer_variables)
        mapping = list(zip(self.variables, optimizer_variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self.scale_loss(loss)

    def _unscale(self, grads, variables):
        chosen = [
            i
            for i, (g, v) in enumerate(zip(grads, variables, strict=True))
            if g is not None and not getattr(v, "overwrite_with_gradient", False)
        ]
        unscaled = engine.unscale([grads[i] for i in chosen], self._scale())
        by_index = dict(zip(chosen, unscaled, strict=True))
        return [by_index.get(i, g) for i, g in enumerate(grads)]

    @contextlib.contextmanager
    def requires_scaled_loss(self):
        """Inside, `apply` raises unless this optimizer scaled a loss there."""
        before = self._loss_was_scaled
        self._loss_was_scaled, self._in_transaction = False, True
        try:
            yield
        finally:
            self._loss_was_scaled = before or self._loss_was_scaled
            self._in_transaction = False


def _widen(loss):
    narrow = keras.backend.standardize_dtype(loss.dtype) in ("float16", "bfloat16")
    return ops.cast(loss, "float32") if narrow else loss
