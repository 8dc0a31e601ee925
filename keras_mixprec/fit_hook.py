"""The hook of `keras-mixprec launch`, around the public `keras.Model.fit`.

Its reach, at every `fit` of a Keras model, from `install` to `remove`:
- the call gets one more callback, a `MixedPrecisionMonitor`, if it has none;
- when `fit` has returned, `on_end` is told what the last epoch logged.

Nothing else of the call changes. It is never put by `import keras_mixprec`; `remove`
leaves `keras.Model` as Keras made it.
"""

import functools
import inspect
from collections.abc import Callable

import keras

from keras_mixprec.callbacks.monitor import MixedPrecisionMonitor

_state = {"original": None}


def install(monitor: bool = True, on_end: Callable[[dict], None] | None = None) -> None:
    """Stand before `keras.Model.fit`. A second call replaces the first.

    Args:
        monitor: Whether to add the callback. Defaults to `True`.
        on_end: Function of a dict: the `model`'s name, `epochs`, and the last epoch's
            `logs`. Defaults to none.
    """
    remove()
    _state["original"] = keras.Model.fit
    _owner().fit = _hooked(keras.Model.fit, monitor, on_end)


def remove() -> None:
    """Leave `keras.Model` as Keras made it. Idempotent."""
    if _state["original"] is not None:
        _owner().fit = _state["original"]
        _state["original"] = None


def _owner():
    return next(c for c in keras.Model.__mro__ if "fit" in vars(c))


def _hooked(original, monitor, on_end):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if monitor:
            callbacks = bound.arguments.get("callbacks")
            bound.arguments["callbacks"] = _with_monitor(callbacks, bound.args[0])
        history = original(*bound.args, **bound.kwargs)
        if on_end is not None:
            on_end(_summary(bound.args[0], history))
        return history

    return fit


def _with_monitor(callbacks, model):
    if isinstance(callbacks, keras.callbacks.CallbackList):
        if not _has_monitor(callbacks.callbacks):
            _put_first(MixedPrecisionMonitor(), callbacks, model)
        return callbacks
    listed = keras.tree.flatten(callbacks or [])
    return listed if _has_monitor(listed) else [*listed, MixedPrecisionMonitor()]


def _put_first(monitor, callbacks, model):
    # `fit` takes a `CallbackList` as it is: it has handed out the model already.
    monitor.set_params(callbacks.params)
    monitor.set_model(model)
    callbacks.callbacks.insert(0, monitor)


def _has_monitor(callbacks):
    return any(isinstance(c, MixedPrecisionMonitor) for c in callbacks)


def _summary(model, history):
    logs = {key: values[-1] for key, values in history.history.items() if values}
    return {"model": model.name, "epochs": len(history.epoch), "logs": logs}
