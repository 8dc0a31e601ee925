"""Train by `fit` and time it, block by block."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

import keras

from keras_mixprec import hardware


@dataclasses.dataclass
class TimedFit:
    """Epochs of `fit` on the same batches, each of them a timed block.

    Args:
        model: `keras.Model`, compiled.
        data: Inputs and targets of one block: arrays, or structures of them.
        batch_size: Int, samples per step.
        steps: Int, steps per block.
        on_block: Callable without arguments, called after every block.
    """

    model: keras.Model
    data: tuple
    batch_size: int
    steps: int
    on_block: Any
    highest_peak: float = 0.0

    def first_step(self) -> float:
        """Trace, compile and run one step. Returns its seconds."""
        start = time.perf_counter()
        with warnings.catch_warnings():
            # An overflow in the first step is how a loss scale finds its place.
            warnings.filterwarnings("ignore", message="Epoch 1: all 1 steps")
            self._fit(self.batch_size, 1)
        return time.perf_counter() - start

    def blocks(self, count: int) -> tuple[list[float], float]:
        """Run some blocks. Returns the seconds of each, and the loss of the last."""
        return self._fit(self.batch_size * self.steps, count)

    def _fit(self, samples, epochs):
        clock = _Clock(self.on_block)
        x, y = keras.tree.map_structure(
            lambda a: None if a is None else a[:samples], self.data
        )
        history = self.model.fit(
            x, y, self.batch_size, epochs, shuffle=False, verbose=0, callbacks=[clock]
        )
        return clock.seconds, float(history.history["loss"][-1])

    def peak_memory(self) -> float | None:
        """Return MiB at the peak since the last call.

        On all devices; without accelerator, resident memory. `None` if the backend
        cannot reset its peak, and what it shows may be from before.
        """
        devices = hardware.gpu_memory()
        if not devices:
            return hardware.host_memory()
        peak = sum(peak for _, peak in devices.values())
        is_new = hardware.reset_peak_memory() or peak > self.highest_peak
        self.highest_peak = max(peak, self.highest_peak)
        return peak if is_new else None


class _Clock(keras.callbacks.Callback):
    """Times each epoch from its first batch until the device has finished."""

    def __init__(self, on_block):
        super().__init__()
        self.on_block = on_block
        self.seconds = []

    # No `*_batch_end`: with one, Keras waits for the logs of every step.
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # The logs are read by now; the weights' update may still be under way.
        keras.ops.convert_to_numpy(self.model.trainable_variables[-1])
        self.seconds.append(time.perf_counter() - self.start)
        self.on_block()
