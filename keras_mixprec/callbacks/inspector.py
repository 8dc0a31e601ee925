"""`OverflowInspector`: which layers leave float16's range, forward and backward."""

import collections
import fnmatch
import logging
import numbers
from collections.abc import Iterable
from typing import Any

import keras

from keras_mixprec.instrument import Instrument
from keras_mixprec.range_report import Frame
from keras_mixprec.range_report import RangeReport
from keras_mixprec.ranges import merged

_logger = logging.getLogger("keras_mixprec")
# While it waits for an overflow it asks the device this rarely.
_EXECUTIONS_BETWEEN_LOOKS = 16


class OverflowInspector(keras.callbacks.Callback):
    """Measure what passes through every layer, forward and backward.

    For each layer: the largest and the smallest magnitude but 0 of its outputs, of
    their gradients and of its weights' gradients, and how many of the values are inf
    or NaN, beyond float16, subnormal in float16, or 0 in it. Gradients are those of
    the scaled loss, so that underflow is underflow at the present loss scale. In a
    layer that computes in float16 what underflowed is 0 already and counts as `zero`.

    By default it watches until a step overflows, and keeps that step and the
    `frames - 1` before it. With `epochs` or `batches` it looks at those batches only.
    Every other batch runs the model's own train function: at no cost at all. A
    batch that is looked at runs a twin of it, compiled by itself, that computes the
    same and measures; nothing is read from the device before the end of the epoch, or,
    while waiting for an overflow, every 16 executions.

    Example:

    ```python
    inspector = mp.OverflowInspector()
    model.fit(x, y, callbacks=[inspector])
    print(inspector.report)                      # a table for each frame
    inspector.report.frames[-1].culprit()        # ("dense_3", "activations overflow")
    inspector.report.heat_map("ranges.png")
    ```

    Args:
        epochs: Ints from 0, the epochs to look at. Defaults to all.
        batches: Ints from 0, the batches to look at in each of them. Defaults to the
            first one, if `epochs` is given. Of a model that the first batch builds
            (a subclassed one, on TensorFlow) the second batch takes its place.
        frames: Int >= 1, how many frames to keep while waiting for an overflow.
            Defaults to `3`.
        layers: Glob patterns of layer paths, as `mp.plan` prints them. An overflow is
            seen by the layers chosen. Defaults to `("*",)`, all.
        calls: Int >= 1, how many calls or outputs of one layer to measure in a
            step. Defaults to `4`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        epochs: Iterable[int] | None = None,
        batches: Iterable[int] | None = None,
        frames: int = 3,
        layers: Iterable[str] = ("*",),
        calls: int = 4,
    ):
        super().__init__()
        self._waits = epochs is None and batches is None
        self._epochs = _indices("epochs", epochs)
        default = None if self._waits else {0}
        self._batches = default if batches is None else _indices("batches", batches)
        self._frames = _positive("frames", frames)
        self._calls = _positive("calls", calls)
        self._layers = _patterns(layers)
        self._watched = self._instrument = self._plain = self._made_for = None
        self._waiting = self._possible = self._owes = False
        self._pending: collections.deque = collections.deque()
        self._epoch = self._batch = 0
        self.report = RangeReport([])

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forget earlier runs, and see whether this model can be measured."""
        # Kept, because asking for `self.model` moves the state of a run on JAX.
        self._watched = self.model
        self._disarm()
        self._instrument, self._owes = None, False
        self._waiting = self._waits
        self._pending.clear()
        self.report = RangeReport([])
        self._possible = self._can_measure(self._watched)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Note which epoch it is."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Have the coming batches measured, or not."""
        if len(self._pending) >= _EXECUTIONS_BETWEEN_LOOKS and self._waiting:
            self._read()
        self._batch = batch
        wanted = self._possible and (self._owes or self._wants(batch))
        # A model that the first step builds is looked at from the next one on.
        self._owes = wanted and not self._watched.built
        if wanted and not self._owes:
            self._arm()
        else:
            self._disarm()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Read what was measured."""
        self._disarm()
        self._read()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leave the model as it was."""
        self._disarm()

    def _can_measure(self, model):
        strategy = getattr(model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)
        if model.optimizer is None or replicas > 1:
            _logger.warning(
                "OverflowInspector looks at nothing: it measures models with an "
                "optimizer on one replica. Received: model '%s' on %d replicas.",
                *(model.name, replicas),
            )
            return False
        return True

    def _wants(self, batch):
        if self._waits:
            return self._waiting
        if self._epochs is not None and self._epoch not in self._epochs:
            return False
        execution = range(batch, batch + self._watched.steps_per_execution)
        return not self._batches.isdisjoint(execution)

    # -- the train function ---------------------------------------------------------

    def _arm(self):
        model = self._watched
        if self._plain is not None:
            return
        # A new train function computes in other precisions: its twin must too.
        if self._instrument is None or model.train_function is not self._made_for:
            self._made_for = model.train_function
            if not model.optimizer.built:
                # Inside the first step its loss scale would be a constant.
                model.optimizer.build(model.trainable_variables)
            self._instrument = Instrument(model, self._is_chosen, self._calls)
        self._plain = model.train_function
        model.train_function = self._measure

    def _disarm(self):
        if self._plain is not None:
            self._watched.train_function, self._plain = self._plain, None

    def _measure(self, *args: Any) -> Any:
        try:
            result, log = self._instrument.run(*args)
        except BaseException:
            # A run that ends here must not leave its train function behind.
            self._disarm()
            raise
        self._pending.append((self._epoch, self._batch, log))
        return result

    def _is_chosen(self, path):
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self._layers)

    # -- frames ---------------------------------------------------------------------

    def _read(self):
        found = []
        while self._pending:
            epoch, batch, log = self._pending.popleft()
            steps = self._instrument.steps(log)
            found += [
                (epoch, batch + i, step)
                for i, step in enumerate(steps)
                # Of an execution of several steps only those asked for.
                if len(steps) == 1 or self._is_asked_for(batch + i)
            ]
        self._keep(found)

    def _is_asked_for(self, batch):
        return self._waits or batch in self._batches

    def _keep(self, found):
        if not self._waits:
            self.report.frames += map(self._frame, found)
        elif self._waiting:
            steps = [step for _, _, step in found]
            overflows = [*map(self._instrument.overflowed, steps)] if found else []
            if any(overflows):
                self._waiting = False
                found = found[: overflows.index(True) + 1]
            frames = [*map(self._frame, found[-self._frames :])]
            self.report.frames = [*self.report.frames, *frames][-self._frames :]
            if not self._waiting:
                _logger.warning("First overflow.\n%s", self.report.table())

    def _frame(self, found):
        epoch, batch, step = found
        scale, rows = self._instrument.decode(step)
        measured = {key: merged(values) for key, values in rows.items()}
        return Frame(
            *(epoch, batch, scale),
            {key: r for key, r in measured.items() if r is not None},
        )


def _indices(name, values):
    if values is None:
        return None
    values = list(values) if isinstance(values, Iterable) else [values]
    if not values or not all(
        isinstance(v, numbers.Integral) and v >= 0 for v in values
    ):
        raise ValueError(
            f"`{name}` must be integers >= 0, at least one. Received: {name}={values}. "
            f"Pass for example `{name}=[0]`, counted from 0."
        )
    return set(values)


def _positive(name, value):
    if not (isinstance(value, numbers.Integral) and value >= 1):
        raise ValueError(
            f"`{name}` must be an integer >= 1. Received: {name}={value!r}. "
            f"Leave `{name}` out for the default."
        )
    return int(value)


def _patterns(layers):
    layers = [layers] if isinstance(layers, str) else list(layers)
    if not layers or not all(isinstance(pattern, str) for pattern in layers):
        raise ValueError(
            "`layers` must be glob patterns of layer paths. Received: "
            f'layers={layers}. Pass for example `layers=["encoder/*"]`.'
        )
    return layers
