"""Who looks at a model's train steps, and when: one twin serves all who do.

Two that each put a twin in the place of the model's train function would take each
other's for the model's own.
"""

from __future__ import annotations

import weakref
from typing import Any
from typing import Protocol

import keras

from keras_mixprec.instrument import Instrument


class Watcher(Protocol):
    """Who looks at train steps.

    Args:
        calls: Int, how many calls or outputs of a layer to measure in a step.
        model: `keras.Model`, as callbacks have it.
    """

    calls: int
    model: keras.Model

    def watches(self, path: str) -> bool:
        """Return whether to measure a layer."""

    def receive(self, log: Any, instrument: Instrument) -> None:
        """Take the log of an execution, which `instrument` reads."""


class Inspection:
    """The twin of one model's train function, and who has it run.

    Args:
        model: Compiled `keras.Model`.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        # A run that broke off never left.
        self._watchers: weakref.WeakSet = weakref.WeakSet()
        self._armed: list[Watcher] = []
        self._instrument = self._plain = self._made_for = None

    def join(self, watcher: Watcher) -> None:
        """Have a watcher's layers among those that the twin measures.

        Args:
            watcher: Who may look from now on.
        """
        self._watchers.add(watcher)
        self._instrument = None

    def leave(self, watcher: Watcher) -> None:
        """Undo `join`.

        Args:
            watcher: Who joined.
        """
        self.disarm(watcher)
        self._watchers.discard(watcher)
        if not self._watchers:
            # Whoever joins next needs another one.
            self._instrument = self._made_for = None

    def arm(self, watcher: Watcher) -> None:
        """Have the coming batches measured, for a watcher that joined.

        Args:
            watcher: Who looks.
        """
        if watcher not in self._armed:
            self._armed.append(watcher)
        model = self._model
        if model.train_function == self._run:
            return
        # A new train function computes in other precisions: its twin must too.
        if self._instrument is None or model.train_function is not self._made_for:
            # Asked for like this, a model on JAX takes its weights back from the run:
            # where they lie on devices is read off them.
            model = watcher.model
            self._made_for = model.train_function
            if not model.optimizer.built:
                # Inside the first step its loss scale would be a constant.
                model.optimizer.build(model.trainable_variables)
            self._instrument = Instrument(model, self._is_watched, self._calls())
        self._plain, model.train_function = model.train_function, self._run

    def disarm(self, watcher: Watcher) -> None:
        """Undo `arm`; after the last one the model's own function runs again.

        Args:
            watcher: Who looked.
        """
        if watcher in self._armed:
            self._armed.remove(watcher)
        if not self._armed:
            self._restore()

    def _restore(self):
        # One that was made anew in the meantime stays.
        if self._model.train_function == self._run:
            self._model.train_function = self._plain
        self._plain = None

    def _run(self, *args: Any) -> Any:
        try:
            result, log = self._instrument.run(*args)
        except BaseException:
            # A run that ends here must not leave its train function behind.
            self._armed.clear()
            self._restore()
            raise
        for watcher in self._armed:
            watcher.receive(log, self._instrument)
        return result

    def _is_watched(self, path):
        return any(watcher.watches(path) for watcher in self._watchers)

    def _calls(self):
        return max(watcher.calls for watcher in self._watchers)


def inspection_of(model: keras.Model) -> Inspection:
    """Return the model's `Inspection`, the same one each time.

    Args:
        model: Compiled `keras.Model`.
    """
    # Past Keras's bookkeeping of attributes.
    return vars(model).setdefault("_mixprec_inspection", Inspection(model))
