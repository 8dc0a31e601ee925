"""`MixedPrecisionMonitor`: loss scale, overflows and memory in every epoch's logs."""

import logging
from typing import Any

import keras

from keras_mixprec import compile_hook
from keras_mixprec import hardware
from keras_mixprec.attribution import attribute
from keras_mixprec.attribution import read_counters
from keras_mixprec.backend import engine
from keras_mixprec.callbacks.order import stand_first
from keras_mixprec.diagnosis import describe
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.tensor_cores import tensor_core_advice
from keras_mixprec.transaction import loss_scale_optimizers

_logger = logging.getLogger("keras_mixprec")


class MixedPrecisionMonitor(keras.callbacks.Callback):
    """Add what half precision does to the logs of every epoch.

    The progress bar, `History`, `CSVLogger`, `TensorBoard` and every other callback
    see the keys, wherever this callback stands in the list. All are read once, at
    the end of the epoch; nothing is added to a training step.

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
    the process's own devices. Only the chief (rank 0) says anything.

    Example:

    ```python
    model.fit(x, y, callbacks=[mp.MixedPrecisionMonitor()])
    # loss: 0.31 - loss_scale: 32768 - overflow_count: 1 - gpu_memory_peak_mb: 5481
    ```

    Args:
        verbose: Int. 1 logs after each epoch with overflows which layers they began
            in, nearest the loss first; read from the optimizer only then. Defaults
            to 0.

    Raises:
        ValueError: At the start of training, if the model is not compiled.
    """

    def __init__(self, verbose: int = 0):
        super().__init__()
        self.verbose = verbose
        self._said = set()
        self._total_before = {}
        self._counts_before = {}
        self._activity = None
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
        self._counts_before = self._counts()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Start the epoch's memory peak and its counters anew."""
        hardware.reset_peak_memory()
        self._activity = hardware.start_activity()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Write the keys into `logs`."""
        if logs is not None:
            logs |= self._read_scales() | self._read_memory()
            logs |= hardware.read_activity(self._activity)
            self._advise(logs)
            self._name_layers(epoch, logs)

    def _name_layers(self, epoch, logs):
        skipped = [n for key, n in logs.items() if key.endswith("overflow_count")]
        if not (self.verbose and any(skipped) and engine.is_chief(self.model)):
            return
        before, self._counts_before = self._counts_before, self._counts()
        where = attribute(self.model, self._counts_before - before)
        _logger.info("Epoch %d: %s", epoch + 1, describe(where, "this epoch"))

    def _counts(self):
        return read_counters(loss_scale_optimizers(self.model))

    def _advise(self, logs):
        advice = tensor_core_advice(self.model, logs)
        if advice and not self._advised:
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
            scale = keras.ops.convert_to_numpy(optimizer.dynamic_scale)
            logs[f"{prefix}loss_scale"] = float(scale)
            if prefix in totals:
                before = self._total_before.get(prefix, 0)
                logs[f"{prefix}overflow_count"] = totals[prefix] - before
                logs[f"{prefix}overflow_total"] = totals[prefix]
        self._total_before = totals
        return logs

    def _read_memory(self):
        devices = hardware.gpu_memory()
        if not devices:
            self._say_once(
                "No accelerator is visible: the gpu_* keys are left out and "
                "host_memory_mb is logged instead."
            )
            return {"host_memory_mb": hardware.host_memory()}
        logs = {
            "gpu_memory_mb": sum(used for used, _ in devices.values()),
            "gpu_memory_peak_mb": sum(peak for _, peak in devices.values()),
        }
        if len(devices) > 1:
            for i, (used, peak) in enumerate(devices.values()):
                logs |= {f"gpu_memory_mb_{i}": used, f"gpu_memory_peak_mb_{i}": peak}
        return logs

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
