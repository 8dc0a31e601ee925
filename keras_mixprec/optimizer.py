"""`LossScaleOptimizer`: dynamic loss scaling that never writes a non-finite value."""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mixprec import optimizer_state
from keras_mixprec.backend import engine
from keras_mixprec.backend.update import Update
from keras_mixprec.inner_optimizer import bare_optimizer
from keras_mixprec.inner_optimizer import is_keras_own
from keras_mixprec.inner_optimizer import warn_about_inner_scale
from keras_mixprec.loss_scale import LossScaleRule
from keras_mixprec.misuse import check_any_gradient
from keras_mixprec.misuse import check_has_variables
from keras_mixprec.misuse import check_loss_was_scaled
from keras_mixprec.misuse import check_same_length
from keras_mixprec.overflow_counters import OverflowCounters
from keras_mixprec.scaled_loss import ScaledLoss

_OWN_DEFAULTS = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "min_scale": 2.0**-14,
    "max_scale": 2.0**24,
    "hysteresis": 1,
    "consecutive_hysteresis": False,
}


@keras.saving.register_keras_serializable(package="keras_mixprec")
class LossScaleOptimizer(
    ScaledLoss, OverflowCounters, keras.optimizers.LossScaleOptimizer
):
    """Scale the loss, skip steps that overflow, and count both.

    Drop-in for `keras.optimizers.LossScaleOptimizer`. A step in which any variable's
    gradient is not finite, or has a norm above 2**48 (its squares would not add up in
    float32), changes nothing but the loss scale and the counters: no weight, no slot,
    no schedule. The scale moves as `keras_mixprec.loss_scale.next_state` says.

    A fixed loss scale is `growth_factor=1.0, backoff_factor=1.0`.

    Example:

    ```python
    model.compile(mp.LossScaleOptimizer("adam"), loss="mse")
    model.fit(x, y)
    model.optimizer.overflow_counts     # {"dense/kernel": 3, "dense/bias": 0}
    ```

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, its name, or its config.
        initial_scale: Float, the first loss scale. Defaults to `2.0**15`.
        dynamic_growth_steps: Int, finite steps in a row before the scale grows.
            Defaults to `2000`.
        growth_factor: Float >= 1, what the scale grows by. Defaults to `2.0`.
        backoff_factor: Float in (0, 1], what an overflow multiplies the scale by.
            Defaults to `0.5`.
        min_scale: Float of at least `2.0**-126`. Defaults to `2.0**-14`.
        max_scale: Float of at most `2.0**126`. Defaults to `2.0**24`.
        hysteresis: Int >= 1, the overflow that first lowers the scale, as DeepSpeed
            has it. Defaults to `1`.
        consecutive_hysteresis: Bool, refill the hysteresis at every finite step
            instead of at every growth. Defaults to `False`.
        name: String or `None`.

    Raises:
        ValueError: If a number is out of its range, the bounds cross, or
            `inner_optimizer` scales the loss already.
        TypeError: If a number is not one.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str | dict,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 2.0**-14,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = False,
        **kwargs: Any,
    ):
        rule = LossScaleRule(
            initial_scale,
            dynamic_growth_steps,
            growth_factor,
            backoff_factor,
            min_scale,
            max_scale,
            hysteresis,
            consecutive_hysteresis,
        )
        inner_optimizer = bare_optimizer(inner_optimizer)
        warn_about_inner_scale(inner_optimizer)
        super().__init__(
            inner_optimizer, initial_scale, dynamic_growth_steps, name=name, **kwargs
        )
        self.rule = rule
        self._load_when_built = None

    def build(self, var_list: list) -> None:
        """Create the variables of this optimizer and of the inner one.

        Args:
            var_list: List of `keras.Variable`, the trainable variables.
        """
        if not var_list:
            # Keras builds an optimizer for no variables while it reads HDF5, before
            # it hands over the weights; there is nothing to build for yet.
            return
        super().build(var_list)
        self._build_counters(len(var_list))
        if self._load_when_built is not None:
            load, self._load_when_built = self._load_when_built, None
            load()

    def build_for_waiting_weights(self, var_list: list) -> None:
        """Build now, before a step is traced, if the state to load came too early.

        Args:
            var_list: List of `keras.Variable`, the trainable variables.
        """
        if self._load_when_built is not None and not self.built:
            self.build(var_list)

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        """Unscale the gradients and update the variables, unless one overflowed.

        Args:
            grads: List of gradients of the scaled loss, `None` where there is none.
            trainable_variables: List of variables, one per gradient. Defaults to
                those the optimizer was built with.

        Raises:
            ValueError: If the loss was never scaled, or the lists do not fit.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._variables_for(grads, trainable_variables)
        check_loss_was_scaled(self, variables)
        check_any_gradient(grads)
        unscaled, self._gradients_were_unscaled = self._gradients_were_unscaled, False
        scale = ops.ones(()) if unscaled else self._scale()
        engine.commit(
            Update(
                # Before anything branches on them.
                grads=engine.reduce_gradients(grads),
                scale=scale,
                unscale=lambda g: g if unscaled else self._unscale(g, variables),
                apply=lambda g: self.inner_optimizer.apply(g, variables),
                record=lambda flags: self._record(flags, variables),
                targets=variables,
                variables=[*self._trainable_variables, *self.inner_optimizer.variables],
                optimizer=self.inner_optimizer,
                compilable=lambda: is_keras_own(
                    self.inner_optimizer, self._trainable_variables
                ),
                half=lambda: _to_blame(variables),
            )
        )

    def stateless_apply(
        self, optimizer_variables: list, grads: list, trainable_variables: list
    ) -> tuple[list, list]:
        """Return the new trainable and optimizer variables; assign nothing.

        Args:
            optimizer_variables: List of tensors, the values of `self.variables`.
            grads: List of gradients of the scaled loss.
            trainable_variables: List of tensors.

        Raises:
            ValueError: If the optimizer is not built, or the lists do not fit.
        """
        # Not Keras's wrapper's, whose `cond` keeps XLA from fusing the skip.
        return super(keras.optimizers.LossScaleOptimizer, self).stateless_apply(
            optimizer_variables, grads, trainable_variables
        )

    def _variables_for(self, grads, variables):
        check_has_variables(self, variables)
        variables = list(self._trainable_variables if variables is None else variables)
        check_same_length(grads, variables)
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        return variables

    def save_own_variables(self, store: Any) -> None:
        """Write every variable to `store`, those of Keras's wrapper first."""
        optimizer_state.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables`, ours or Keras's wrapper's, wrote.

        Before the optimizer is built, as in `load_weights` of a model that has not
        trained yet, it is kept until then.

        Args:
            store: Mapping from "0", "1", ... to arrays.
        """
        if not self.built:
            copies = {key: np.array(store[key]) for key in list(store.keys())}
            self._load_when_built = functools.partial(self.load_own_variables, copies)
        elif not optimizer_state.load(self, store):
            # Keras's own warning, which names both numbers.
            super().load_own_variables(store)

    def set_weights(self, weights: list) -> None:
        """Set all variables, the inner optimizer's included.

        Keras's own sets those of the wrapper alone, so that a model read from HDF5
        starts again at iteration 0. Before the optimizer is built they are kept
        until it is.

        Args:
            weights: List of arrays in the order of `self.variables`, ours or that
                of Keras's wrapper.
        """
        if not self.built:
            # Copies: the file they are read from may be closed by then.
            copies = [np.array(w) for w in weights]
            self._load_when_built = functools.partial(self.set_weights, copies)
        else:
            optimizer_state.set_weights(self, weights)

    def get_config(self) -> dict:
        """Return the config: Keras's four keys, and ours where not the default."""
        own = {name: getattr(self.rule, name) for name in _OWN_DEFAULTS}
        changed = {k: v for k, v in own.items() if v != _OWN_DEFAULTS[k]}
        return {**super().get_config(), **changed}


def _to_blame(variables):
    # What overflows in the update is float16; if it is none of these, it is all's.
    half = [v.dtype == "float16" for v in variables]
    return half if any(half) else [True] * len(half)
