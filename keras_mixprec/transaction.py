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
from collections.abc import Callable, Iterator
from typing import Any

import keras

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

    @contextlib.contextmanager
    def requires_scaled_loss(self) -> Iterator[None]:
        """Inside, an optimizer that was not asked to scale a loss refuses to step."""
        with contextlib.ExitStack() as stack:
            for optimizer in self.optimizers():
                stack.enter_context(optimizer.requires_scaled_loss())
            yield

    def logs(self, logs: Any) -> Any:
        """The step's logs, read again after the roll-back where they are metrics'."""
        metrics = self.model.get_metrics_result()
        same = isinstance(logs, dict) and set(logs) == set(metrics)
        return metrics if same else logs


class HonestEpoch(keras.callbacks.Callback):
    """Logs NaN for an epoch in which no step was applied, and warns.

    A metric without data is 0.0 in Keras: to early stopping the best loss ever.
    """

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Note how many steps were skipped and applied so far."""
        self._before = self._counts()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Replace the logs of an epoch that was skipped whole."""
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


def attach(model: keras.Model) -> None:
    """Make every train step of `model` a transaction. Idempotent.

    Args:
        model: `keras.Model`; its `train_step`, `fit` and `train_on_batch` are shadowed
            on the instance.
    """
    _shadow(model, "train_step", _as_transaction)
    _shadow(model, "fit", _with_honest_epochs)
    _shadow(model, "train_on_batch", _with_honest_result)


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
