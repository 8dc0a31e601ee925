"""Where a callback stands among the others: what the first adds to logs all see."""

import sys

import keras


def stand_first(callback: keras.callbacks.Callback) -> None:
    """Move a callback to the front of the list that is handing out the model.

    To be called from `set_model`. The logs of an epoch pass through the callbacks in
    turn; only what the first adds is seen by all.

    Args:
        callback: The callback.
    """
    callbacks = _calling_list(callback)
    if callbacks is not None:
        # Keras iterates over the list while it calls `set_model`, so it gets a new one
        # instead of a changed one.
        rest = [c for c in callbacks.callbacks if c is not callback]
        callbacks.callbacks = [callback, *rest]


def _calling_list(callback):
    """Return the `CallbackList` that is handing out the model, if one is.

    Keras does not tell a callback which list it stands in.
    """
    frame = sys._getframe(3)
    owner = frame.f_locals.get("self")
    known = isinstance(owner, keras.callbacks.CallbackList)
    return owner if known and callback in owner.callbacks else None
