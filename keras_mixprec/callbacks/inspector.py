"""`OverflowInspector`: which layers leave float16's range, forward and backward."""

import fnmatch
import logging
import numbers
from collections.abc import Iterable
from typing import Any

import keras

from keras_mixprec.inspection import inspection_of
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
    while waiting for an overflow, every 16 executions. Inspectors of one model share
    the twin, that in `AdaptivePrecision` included.

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
        self.calls = _positive("calls", calls)
        self._layers = _patterns(layers)
        self._watched = self._inspection = None
        self._waiting = self._possible = self._owes = False
        self._pending: list = []
        self._kept: list = []
        self._epoch = self._batch = 0
        self._report = RangeReport([])

    @property
    def report(self) -> RangeReport:
        """The `RangeReport` of the frames that were kept."""
        frames, self._kept = [*map(self._frame, self._kept)], []
        self._report.frames = self._to_keep([*self._report.frames, *frames])
        return self._report

    def watches(self, path: str) -> bool:
        """Return whether `layers` chooses a layer.

        Args:
            path: The layer, as in `mp.plan`.
        """
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self._layers)

    def receive(self, log: Any, instrument: Instrument) -> None:
        """Take what an execution measured, without reading it.

        Args:
            log: Tensor.
            instrument: What reads it.
        """
        self._pending.append((self._epoch, self._batch, log, instrument))

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forget earlier runs, and see whether this model can be measured."""
        # Kept, because asking for `self.model` moves the state of a run on JAX.
        self._watched = self.model
        self._owes, self._waiting = False, self._waits
        self._pending, self._kept, self._report = [], [], RangeReport([])
        self._possible = self._can_measure(self._watched)
        self._inspection = inspection_of(self._watched)
        self._inspection.disarm(self)
        if self._possible:
            self._inspection.join(self)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Note which epoch it is."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Have the coming batches measured, or not."""
        if len(self._pending) >= _EXECUTIONS_BETWEEN_LOOKS and self._reads_early():
            self._read()
        self._batch = batch
        wanted = self._possible and (self._owes or self._wants(batch))
        # A model that the first step builds is looked at from the next one on.
        self._owes = wanted and not self._watched.built
        if wanted and not self._owes:
            self._inspection.arm(self)
        else:
            self._inspection.disarm(self)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Read what was measured."""
        self._inspection.disarm(self)
        self._read()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leave the model as it was."""
        self._inspection.leave(self)

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

    def _reads_early(self):
        return self._waiting

    # -- frames ---------------------------------------------------------------------

    def _read(self):
        found = []
        for epoch, batch, log, instrument in self._pending:
            steps = instrument.steps(log)
            found += [
                (epoch, batch + i, step, instrument)
                for i, step in enumerate(steps)
                # Of an execution of several steps only those asked for.
                if len(steps) == 1 or self._is_asked_for(batch + i)
            ]
        self._pending = []
        self._keep(found)

    def _is_asked_for(self, batch):
        return self._waits or batch in self._batches

    def _keep(self, found):
        if not self._waits or self._waiting:
            until = self._first_overflow(found) if self._waits else None
            self._waiting = self._waits and until is None
            self._kept = self._to_keep([*self._kept, *found[:until]])
            if until is not None:
                _logger.warning("First overflow.\n%s", self.report.table())

    def _first_overflow(self, found):
        """Return the number of steps up to the first that overflowed, else None."""
        flags = [self._overflowed(step, instrument) for *_, step, instrument in found]
        return flags.index(True) + 1 if True in flags else None

    def _overflowed(self, step, instrument):
        return instrument.overflowed(step, self.watches)

    def _to_keep(self, frames):
        return frames[-self._frames :] if self._waits else frames

    def _frame(self, found):
        epoch, batch, step, instrument = found
        scale, rows = instrument.decode(step, self.watches, self.calls)
        measured = {key: merged(values) for key, values in rows.items()}
        known = {key: r for key, r in measured.items() if r is not None}
        return Frame(epoch, batch, scale, known)


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
