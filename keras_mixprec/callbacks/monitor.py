"""`MixedPrecisionMonitor`: loss scale, overflows and memory in every epoch's logs."""

import logging
import os
from typing import Any

import keras

from keras_mixprec import compile_hook
from keras_mixprec import hardware
from keras_mixprec.attribution import attribute
from keras_mixprec.attribution import read_counters
from keras_mixprec.backend import engine
from keras_mixprec.callbacks.order import stand_first
from keras_mixprec.callbacks.outputs import Outputs
from keras_mixprec.callbacks.outputs import batches_between
from keras_mixprec.diagnosis import describe
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.run_record import ATTRIBUTE
from keras_mixprec.tensor_cores import tensor_core_advice
from keras_mixprec.transaction import loss_scale_optimizers

_logger = logging.getLogger("keras_mixprec")


class MixedPrecisionMonitor(keras.callbacks.Callback):
    """Add what half precision does to the logs of every epoch, and say where.

    The progress bar, `History`, `CSVLogger`, `TensorBoard`, the callbacks of Weights &
    Biases and MLflow and every other callback see the keys, wherever this callback
    stands in the list. All are read once, at the end of the epoch; nothing is added
    to a training step.

    | key | what |
    |-|-|
    | `loss_scale` | the loss scale at the end of the epoch |
    | `overflow_count` | steps skipped in this epoch |
    | `overflow_total` | steps skipped since the optimizer was built |
    | `gpu_memory_mb`, `gpu_memory_peak_mb` | MiB in use and at the epoch's peak, \
summed over devices; per device too (`gpu_memory_mb_0`, ...) where there are several |
    | `gpu_util`, `tensor_core_util` | percent of the epoch, where NVML answers |
    | `host_memory_mb` | MiB resident, instead, where there is no accelerator |

    On JAX the peak is that of the process, because JAX cannot reset it. A model with
    several loss-scaling optimizers gets the first three keys once for each, led by
    the attribute's name (`d_optimizer_loss_scale`).

    Of several processes that train together each has the keys in its logs, so that
    callbacks decide alike: the first three are equal everywhere, memory is that of
    the process's own devices, and `gpu_memory_total_mb`, `gpu_memory_peak_total_mb`
    (`host_memory_total_mb`) are sums over processes: of what each last logged, since
    nobody waits for the others. Only the chief (rank 0) says anything.

    Example:

    ```python
    model.fit(x, y, callbacks=[mp.MixedPrecisionMonitor()])
    # loss: 0.31 - loss_scale: 32768 - overflow_count: 1 - gpu_memory_peak_mb: 5481
    ```

    Args:
        verbose: Int. 1 logs after each epoch with overflows where they began: in
            which layers, nearest the loss first, or in the loss itself already.
            Defaults to 0.
        json_lines: Path of a file to append one JSON object per epoch to: all logs
            and, under `overflows`, where they began. The model's plan goes beside it,
            into `<name>.plan.json`; `mp.report` reads both. Defaults to `None`.
        log_dir: Path of TensorBoard's folder: the keys below `mixed_precision/`, by
            epoch. Takes the `tensorboard` extra. Defaults to `None`.
        update_freq: `"epoch"`, or int >= 1: also every that many batches, `loss_scale`
            and `overflow_total` as `mixed_precision/batch_...` by training step; each
            time the device is read and waited for. Defaults to `"epoch"`.

    Raises:
        ValueError: If `update_freq` is neither; and at the start of training, if the
            model is not compiled.
        ImportError: At the start of training, if `log_dir` is given without the
            `tensorboard` extra.
    """

    def __init__(
        self,
        verbose: int = 0,
        json_lines: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        update_freq: int | str = "epoch",
    ):
        super().__init__()
        self.verbose = verbose
        self._paths = json_lines, log_dir
        self._every, self._last_batch = batches_between(update_freq), 0
        self._outputs = None
        self._said = set()
        self._total_before = {}
        self._counters_before = None
        self._overflows = {}
        self._activity = None
        self._is_first, self._since_second_batch = False, None
        self._advised = False

    def set_model(self, model: keras.Model) -> None:
        """Take the model, and the first place in the list of callbacks."""
        super().set_model(model)
        stand_first(self)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Check that the loss is scaled; say once what cannot be logged."""
        if not self.model.compiled:
            raise ValueError(
                "`MixedPrecisionMonitor` needs a compiled model. Received: "
                f"model '{self.model.name}', not compiled. "
                "Call `model.compile(...)` first."
            )
        self._check_scaling()
        self._total_before = self._totals()
        self._counters_before = self._counters()
        if engine.is_chief(self.model):
            self._outputs = Outputs(*self._paths)
        self._overflows = {}
        history = getattr(self.model, "history", None)
        if history is not None:
            # Beside its numbers, for `mp.report`.
            setattr(history, ATTRIBUTE, self._overflows)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Start the epoch's memory peak and its counters anew."""
        self._last_batch = 0
        hardware.reset_peak_memory()
        self._activity = hardware.start_activity(power=False)
        self._is_first, self._since_second_batch = True, None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Write what the batches before came to, if asked to."""
        if batch and self._is_first:
            # What the advice goes by: the first batch may have compiled for minutes.
            self._is_first = False
            if self._activity and not self._advised:
                self._since_second_batch = hardware.start_activity(power=False)
        # Not after a batch: a hook there switches off asynchronous dispatch.
        if not (self._every and self._outputs):
            return
        # An execution of several steps may pass the one that is due.
        due = batch // self._every > self._last_batch // self._every
        self._last_batch = batch
        if due:
            self._write_batch()

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Judge an epoch before its validation, which may compile too."""
        self._advise()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Write the keys into `logs`."""
        if logs is None:
            return
        own = self._read_scales() | self._read_memory()
        own |= hardware.read_activity(self._activity)
        logs |= own
        self._advise()
        skipped = any(n for key, n in own.items() if key.endswith("overflow_count"))
        where = self._attribute(epoch) if skipped else None
        if self._outputs:
            self._outputs.epoch(self.model, epoch, logs, own, where)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Close what was written."""
        if self._outputs:
            self._outputs.close(self.model)

    def _attribute(self, epoch):
        before, self._counters_before = self._counters_before, self._counters()
        where = attribute(self.model, self._counters_before - before)
        self._overflows[epoch] = where
        if self.verbose and engine.is_chief(self.model):
            # Not `info`: Python shows that to nobody who has not asked logging for it.
            said = describe(where, "this epoch")
            _logger.warning("Epoch %d: %s", epoch + 1, said)
        return where

    def _counters(self):
        return read_counters(loss_scale_optimizers(self.model))

    def _write_batch(self):
        optimizers, values, step = self._optimizers(), {}, 0
        for prefix, optimizer in optimizers.items():
            values[f"{prefix}loss_scale"] = _loss_scale(optimizer)
            applied = optimizer.inner_optimizer.iterations
            steps = int(keras.ops.convert_to_numpy(applied))
            if isinstance(optimizer, LossScaleOptimizer):
                values[f"{prefix}overflow_total"] = optimizer.overflow_count
                steps += optimizer.overflow_count
            step = max(step, steps)
        self._outputs.batch(values, step)

    def _advise(self):
        found = hardware.read_activity(self._since_second_batch)
        self._since_second_batch = None
        advice = tensor_core_advice(self.model, found)
        if advice:
            self._advised = True
            self._say_once(advice)

    def _optimizers(self):
        optimizers = {name: o for name, o in self._wrappers().items() if o.built}
        if len(optimizers) == 1:
            return {"": next(iter(optimizers.values()))}
        return {f"{name}_": o for name, o in optimizers.items()}

    def _totals(self):
        return {
            prefix: o.overflow_count
            for prefix, o in self._optimizers().items()
            if isinstance(o, LossScaleOptimizer)
        }

    def _read_scales(self):
        logs, totals = {}, self._totals()
        for prefix, optimizer in self._optimizers().items():
            logs[f"{prefix}loss_scale"] = _loss_scale(optimizer)
            if prefix in totals:
                before = self._total_before.get(prefix, 0)
                logs[f"{prefix}overflow_count"] = totals[prefix] - before
                logs[f"{prefix}overflow_total"] = totals[prefix]
        self._total_before = totals
        return logs

    def _read_memory(self):
        logs = hardware.memory_logs()
        if "host_memory_mb" in logs:
            self._say_once(
                "No accelerator is visible: the gpu_* keys are left out and "
                "host_memory_mb is logged instead."
            )
        return logs | hardware.memory_over_processes(logs)

    def _check_scaling(self):
        message = compile_hook.unscaled_message(self.model)
        if message:
            self._say_once(message)
        if any(
            not isinstance(o, LossScaleOptimizer) for o in self._wrappers().values()
        ):
            self._say_once(
                "The loss is scaled by Keras's own wrapper: loss_scale is logged; "
                "overflow_count and overflow_total are missing, because it does not "
                "count. For them, compile with `mp.LossScaleOptimizer(...)`."
            )

    def _wrappers(self) -> dict[str, Any]:
        found = {}
        for name, value in vars(self.model).items():
            if isinstance(value, keras.optimizers.LossScaleOptimizer):
                found.setdefault(id(value), (name.lstrip("_"), value))
        return dict(found.values())

    def _say_once(self, message):
        if message not in self._said and engine.is_chief(self.model):
            self._said.add(message)
            _logger.warning(message)


def _loss_scale(optimizer):
    return float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))
