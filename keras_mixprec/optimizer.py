"""`LossScaleOptimizer`: dynamic loss scaling that never writes a non-finite value."""

import contextlib
import functools
import operator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mixprec import optimizer_state
from keras_mixprec.backend import engine
from keras_mixprec.inner_optimizer import bare_optimizer
from keras_mixprec.inner_optimizer import warn_about_inner_scale
from keras_mixprec.loss_scale import LossScaleRule
from keras_mixprec.loss_scale import LossScaleState
from keras_mixprec.loss_scale import next_state

_OWN_DEFAULTS = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "min_scale": 2.0**-14,
    "max_scale": 2.0**24,
    "hysteresis": 1,
    "consecutive_hysteresis": False,
}


@keras.saving.register_keras_serializable(package="keras_mixprec")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
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
        min_scale: Float > 0, below 1 allowed. Defaults to `2.0**-14`.
        max_scale: Float. Defaults to `2.0**24`.
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
        # Known while a step is traced, not while it runs.
        self._loss_was_scaled = False
        self._gradients_were_unscaled = False
        self._in_transaction = False
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
        self.hysteresis_left = self._add_counter(
            "hysteresis_left", initial_value=self.rule.hysteresis
        )
        self.overflow_counter = self._add_counter("overflow_count")
        self.consecutive_counter = self._add_counter("consecutive_overflows")
        # Of each variable: steps in which its gradient overflowed; those of them in
        # which no variable nearer the loss did, while the loss was finite, and while
        # it was not.
        shape = (3, len(var_list))
        self.variable_counters = self._add_counter("overflow_counts", shape)
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

    def _add_counter(self, name, shape=(), initial_value=0):
        return self.add_variable(
            shape=shape,
            dtype="int",
            initializer=keras.initializers.Constant(initial_value),
            aggregation="none",
            name=name,
        )

    # -- what users read ----------------------------------------------------------

    @property
    def loss_scale(self) -> Any:
        """The present loss scale: float32 scalar tensor, usable inside a graph.

        Multiplying a loss by it counts as scaling that loss. Inside `fit` on JAX it
        is what the last synchronisation saw, as every optimizer variable there.
        """
        self._loss_was_scaled = True
        # Not the variable itself, which torch would go on changing.
        return self._scale() * 1.0

    @property
    def overflow_count(self) -> int:
        """Steps skipped since the optimizer was built. Reads the device."""
        return int(self._read("overflow_counter"))

    @property
    def consecutive_overflows(self) -> int:
        """Steps skipped since the last one applied. Reads the device."""
        return int(self._read("consecutive_counter"))

    @property
    def overflow_counts(self) -> dict[str, int]:
        """Variable path -> steps in which its gradient overflowed. Reads the device.

        Of several variables with the same path the second is `path#2`.
        """
        if not self.built:
            return {}
        counts = self._read("variable_counters")[0].tolist()
        return dict(zip(_paths(self._trainable_variables), counts, strict=True))

    def _scale(self):
        scale = self.dynamic_scale if self.built else self.initial_scale
        return ops.convert_to_tensor(scale, "float32")

    def _read(self, name):
        return ops.convert_to_numpy(getattr(self, name)) if self.built else 0

    # -- the loss -----------------------------------------------------------------

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
        self._check_stateless(optimizer_variables)
        mapping = list(zip(self.variables, optimizer_variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self.scale_loss(loss)

    # -- the step -----------------------------------------------------------------

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
        self._check_loss_was_scaled(variables)
        if all(g is None for g in grads):
            raise ValueError("No gradients provided for any variable.")
        unscaled, self._gradients_were_unscaled = self._gradients_were_unscaled, False
        scale = ops.ones(()) if unscaled else self._scale()
        # Before anything branches on them.
        grads = engine.reduce_gradients(grads)

        def update(grads):
            # Unscaled where they are used, so that the quotients need no memory.
            grads = grads if unscaled else self._unscale(grads, variables)
            self.inner_optimizer.apply(grads, variables)

        engine.commit(
            grads,
            scale,
            update,
            lambda flags: self._record(flags, variables),
            [*self._trainable_variables, *self.inner_optimizer.variables],
            compilable=self._is_keras_own,
            optimizer=self.inner_optimizer,
            half=lambda: _to_blame(variables),
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

    def _is_keras_own(self):
        # Keras's own updates are known to compile under XLA; others may call Python.
        parts = [self.inner_optimizer, self.inner_optimizer._learning_rate]
        parts += [v.constraint for v in self._trainable_variables]
        return all(
            p is None or type(p).__module__.split(".")[0] == "keras" for p in parts
        )

    def _variables_for(self, grads, variables):
        if variables is None and not self.built:
            raise ValueError(
                "`apply()` without variables needs a built optimizer. Received: "
                "trainable_variables=None. Pass them, or call "
                "`optimizer.build(trainable_variables)` first."
            )
        variables = list(self._trainable_variables if variables is None else variables)
        if len(variables) != len(grads):
            raise ValueError(
                "`grads` and `trainable_variables` must have the same length. "
                f"Received: {len(grads)} gradients for {len(variables)} variables."
            )
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        return variables

    def _unscale(self, grads, variables):
        chosen = [
            i
            for i, (g, v) in enumerate(zip(grads, variables, strict=True))
            if g is not None and not getattr(v, "overwrite_with_gradient", False)
        ]
        unscaled = engine.unscale([grads[i] for i in chosen], self._scale())
        by_index = dict(zip(chosen, unscaled, strict=True))
        return [by_index.get(i, g) for i, g in enumerate(grads)]

    def _record(self, flags, variables):
        old = LossScaleState(
            self.dynamic_scale,
            self.step_counter,
            self.hysteresis_left,
            self.overflow_counter,
            self.consecutive_counter,
        )
        # Operators, not `ops`, wherever a plain number takes part: see `next_state`.
        overflowed = ops.cast(flags, self.variable_counters.dtype)
        overflowed = self._by_variable(overflowed, variables)
        n = len(self._trainable_variables)
        places = ops.arange(1, n + 1, dtype=overflowed.dtype)
        # Backward, the last variable is the first that an overflow can reach.
        first = ops.max(overflowed * places)
        values = LossScaleState(*(ops.convert_to_tensor(v) for v in old))
        new = next_state(values, first < 1, self.rule)
        began = ops.cast(ops.equal(places, first), overflowed.dtype)
        step = ops.stack([overflowed, began, ops.zeros_like(began)])
        counts = ops.add(self.variable_counters, step)
        engine.assign([*old, self.variable_counters], [*new, counts])

    def _by_variable(self, flags, variables):
        own = self._trainable_variables
        if len(own) == len(variables) and all(map(operator.is_, own, variables)):
            return flags
        order = [self._get_variable_index(v) for v in variables]
        columns = ops.one_hot(order, len(self._trainable_variables), dtype=flags.dtype)
        return ops.sum(columns * ops.expand_dims(flags, 1), axis=0)

    # -- misuse -------------------------------------------------------------------

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

    def _check_loss_was_scaled(self, variables):
        # A variable of a layer has a path below the layer's; gradients for others
        # may come from anywhere.
        if self._loss_was_scaled:
            return
        of_a_model = any("/" in _path(v) for v in variables)
        if not (self._in_transaction or of_a_model):
            return
        raise ValueError(
            f"`apply()` divides the gradients by the loss scale, but '{self.name}' "
            "has not scaled a loss. Received: gradients of an unscaled loss, which "
            f"would become {self.initial_scale:g} times too small. Add "
            "`loss = optimizer.scale_loss(loss)` before the gradients are taken "
            "(JAX: `optimizer.stateless_scale_loss(optimizer_variables, loss)`)."
        )

    def _check_stateless(self, optimizer_variables):
        if not self.built or len(optimizer_variables) != len(self.variables):
            expected = len(self.variables) if self.built else "a built optimizer's"
            raise ValueError(
                f"`optimizer_variables` must hold {expected} values, one for each of "
                f"`optimizer.variables`. Received: {len(optimizer_variables)} values "
                f"and built={self.built}. Call "
                "`optimizer.build(model.trainable_variables)` first."
            )

    # -- state and config ---------------------------------------------------------

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


def _widen(loss):
    narrow = keras.backend.standardize_dtype(loss.dtype) in ("float16", "bfloat16")
    return ops.cast(loss, "float32") if narrow else loss


def _path(variable):
    return getattr(variable, "path", None) or variable.name


def _paths(variables):
    # Names are unique only within one layer; as in a plan, the second gets a number.
    seen: dict[str, int] = {}
    paths = []
    for path in map(_path, variables):
        seen[path] = seen.get(path, 0) + 1
        paths.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return paths
