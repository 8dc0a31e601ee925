"""A train step is a transaction: committed, or rolled back whole.

An optimizer sees trainable variables alone. BatchNormalization statistics and metric
state are written in the forward pass, before it runs. So the model's train step is
wrapped: it notes them, runs, and writes the old values back where the step was
skipped; random seeds advance. Nothing is read from the device.
"""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras

from keras_mixprec import compile_hook
from keras_mixprec.attribution import loss_metrics
from keras_mixprec.backend import engine
from keras_mixprec.optimizer import LossScaleOptimizer


class Transaction:
    """The train step of one model, and what to roll back when it is skipped.

    Args:
        model: `keras.Model`.
        train_step: Callable, the step as the model has it.
    """

    def __init__(self, model: keras.Model, train_step: Callable):
        self.model = model
        self.train_step = train_step
        self._state = ([], [])
        self._settled = False

    def state(self) -> list:
        """What to save before a step: `variables` and the metrics' state.

        Walking the layers takes longer than an eager step's launch, so that the walk
        ends once two in a row found the same.
        """
        if not self._settled:
            before = [id(v) for v in self._state[0]]
            metrics = self.model.metrics
            found = self.variables() + [v for m in metrics for v in m.variables]
            # The metric of a layer inside a layer is listed once for each.
            found = list({id(v): v for v in found}.values())
            self._settled = before == [id(v) for v in found]
            self._state = found, metrics
        return self._state[0]

    def optimizers(self) -> list[LossScaleOptimizer]:
        """The loss-scaling optimizers of the model, a GAN's several included."""
        return loss_scale_optimizers(self.model)

    def variables(self) -> list:
        """Variables that a forward pass may write: not frozen weights, not seeds."""
        frozen = {
            id(v)
            for layer in self.model._flatten_layers()
            for v in layer._trainable_variables
        }
        return [v for v in self.model.non_trainable_weights if id(v) not in frozen]

    def loss_variables(self) -> list:
        """What is not finite after a step whose loss was not: state of loss metrics."""
        return [
            v
            for metric in loss_metrics(self._state[1] or self.model.metrics)
            for v in metric.variables
            if keras.backend.is_float_dtype(v.dtype)
        ]

    @contextlib.contextmanager
    def requires_scaled_loss(self) -> Iterator[None]:
        """Inside, an optimizer that was not asked to scale a loss refuses to step."""
        with contextlib.ExitStack() as stack:
            for optimizer in self.optimizers():
                stack.enter_context(optimizer.requires_scaled_loss())
            yield

    def logs(self, logs: Any) -> Any:
        """The step's logs, read again after the roll-back where they are metrics'."""
        fresh = {}
        for metric in self._state[1] or self.model.metrics:
            result = metric.result()
            fresh.update(result if isinstance(result, dict) else {metric.name: result})
        same = isinstance(logs, dict) and set(logs) == set(fresh)
        return fresh if same else logs


class HonestEpoch(keras.callbacks.Callback):
    """Logs NaN for an epoch in which no step was applied, and warns.

    A metric without data is 0.0 in Keras: to early stopping the best loss ever.
    """

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Warn if layers that were built since `compile` need loss scaling."""
        self._warn_unscaled()
        optimizer = self.model.optimizer
        if isinstance(optimizer, LossScaleOptimizer) and self.model.built:
            optimizer.build_for_waiting_weights(self.model.trainable_variables)

    def _warn_unscaled(self):
        if not self.model.fit.warn_unscaled:
            return
        message = compile_hook.unscaled_message(self.model)
        if message:
            self.model.fit.warn_unscaled = False
            warnings.warn(message, stacklevel=2)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Note how many steps were skipped and applied so far."""
        self._before = self._counts()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Replace the logs of an epoch that was skipped whole."""
        # Again, for a model that its first batch built.
        self._warn_unscaled()
        skipped, applied = self._counts()
        if logs is None or applied != self._before[1] or skipped == self._before[0]:
            return
        for name in self.model.get_metrics_result():
            logs[name] = math.nan
        scale = float(keras.ops.convert_to_numpy(self.model.optimizer.dynamic_scale))
        warnings.warn(
            f"Epoch {epoch + 1}: all {skipped - self._before[0]} steps overflowed and "
            f"were skipped, so its loss is NaN. The loss scale is now {scale:g}. "
            "If it keeps falling, look for NaN or inf in the data, a learning rate "
            "that is too high, or a layer that needs float32; "
            "`model.optimizer.overflow_counts` names the variables.",
            stacklevel=2,
        )

    def _counts(self):
        optimizer = self.model.optimizer
        if not (isinstance(optimizer, LossScaleOptimizer) and optimizer.built):
            return 0, 0
        applied = optimizer.inner_optimizer._iterations
        return optimizer.overflow_count, int(keras.ops.convert_to_numpy(applied))


def attach(model: keras.Model, warn_unscaled: bool = True) -> None:
    """Make every train step of `model` a transaction. Idempotent.

    Args:
        model: `keras.Model`; its `train_step`, `fit`, `train_on_batch` and the sum of
            its extra losses are shadowed on the instance.
        warn_unscaled: Whether to warn at the start of `fit` if the model computes
            in float16 and nothing scales its loss. Defaults to `True`.
    """
    # Anew at each `compile`, which replaces the metrics.
    original = getattr(model.train_step, "__wrapped__", model.train_step)
    is_ours = getattr(model.train_step, "is_transaction", False)
    model.train_step = original if is_ours else model.train_step
    _shadow(model, "train_step", _as_transaction)
    _shadow(model, "fit", _with_honest_epochs)
    _shadow(model, "train_on_batch", _with_honest_result)
    _shadow(model, "_aggregate_additional_loss", _in_float32)
    model.fit.warn_unscaled = warn_unscaled


def _shadow(model, name, wrap):
    method = getattr(model, name)
    if not getattr(method, "is_transaction", False):
        wrapper = functools.wraps(method)(wrap(model, method))
        wrapper.is_transaction = True
        setattr(model, name, wrapper)


def _as_transaction(model, train_step):
    return engine.wrap_train_step(Transaction(model, train_step))


def _with_honest_epochs(model, fit):
    signature = inspect.signature(fit)

    def wrapper(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        callbacks = bound.arguments.get("callbacks")
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            # First, so that every other callback sees the mended logs.
            callbacks = [HonestEpoch(), *keras.tree.flatten(callbacks or [])]
        bound.arguments["callbacks"] = callbacks
        return fit(*bound.args, **bound.kwargs)

    return wrapper


def _in_float32(model, aggregate):
    # `add_loss` and activity regularizers of half-precision layers: their sum
    # overflows in float16, and TensorFlow does not add it to a float32 loss.
    def wrapper(loss):
        half = keras.backend.standardize_dtype(loss.dtype) in ("float16", "bfloat16")
        return aggregate(keras.ops.cast(loss, "float32") if half else loss)

    return wrapper


def _with_honest_result(model, train_on_batch):
    def wrapper(*args, **kwargs):
        before = _overflows(model)
        result = train_on_batch(*args, **kwargs)
        if _overflows(model) == before:
            return result
        # A metric without data is 0.0 in Keras.
        return keras.tree.map_structure(lambda _: math.nan, result)

    return wrapper


def _overflows(model):
    return sum(o.overflow_count for o in loss_scale_optimizers(model))


def loss_scale_optimizers(model: keras.Model) -> list[LossScaleOptimizer]:
    """Return our wrappers that are attributes of `model`, a GAN's several included.

    Args:
        model: `keras.Model`; its attributes are searched.
    """
    found = [v for v in vars(model).values() if isinstance(v, LossScaleOptimizer)]
    return list({id(o): o for o in found}.values())
