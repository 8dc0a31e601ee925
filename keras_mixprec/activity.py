"""How busy the GPUs were since a moment: NVML's counters, read twice."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import types
import weakref

from keras_mixprec.nvml import ask
from keras_mixprec.nvml import say_once
from keras_mixprec.nvml import visible_devices

_MIB = 2**20
# Field of `Reading` -> `nvmlGpmMetricId_t` (NVML API Reference, "NVML GPM").
_GPM_METRICS = {"gpu_util": 1, "tensor_core_util": 5, "hmma_util": 7}
# `nvmlValueType_t` -> the member of the union that holds such a value.
_SAMPLE_FIELDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What NVML says of one device; `None` where it does not answer.

    Args:
        name: The product's name.
        gpu_util: Percent of the time since the start in which kernels ran.
        tensor_core_util: Percent of it in which tensor cores worked.
        hmma_util: Percent of it in which they worked in float16 or bfloat16.
        power_w: Mean power since the start in watts, of the whole GPU.
        memory_used_mb: MiB in use on the device, by all processes.
        memory_total_mb: MiB that the device has.
        memory_process_mb: MiB in use by this process, its CUDA context included.
    """

    name: str | None
    gpu_util: float | None
    tensor_core_util: float | None
    hmma_util: float | None
    power_w: float | None
    memory_used_mb: float | None
    memory_total_mb: float | None
    memory_process_mb: float | None


class Activity:
    """The activity counters of all visible devices, from now on.

    Args:
        nvml: The module `pynvml`, initialised.
        power: Bool, whether `read` is to tell the mean power since now: of the counter
            of energy, for which a driver takes some 3 ms. Else it tells the present
            power. Defaults to `True`.
    """

    def __init__(self, nvml: types.ModuleType, power: bool = True):
        visible = visible_devices(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._watches = [_Watch(nvml, device, power) for device in visible]

    def read(self) -> list[Reading]:
        """Return one `Reading` per device, in CUDA's order."""
        return [watch.read() for watch in self._watches]

    def percent(self) -> list[dict[str, float]]:
        """Return the percentages of `Reading` alone, those that are known, likewise.

        Memory, power and names take the driver longer than these.
        """
        return [watch.percent() for watch in self._watches]


class _Watch:
    def __init__(self, nvml, device, power):
        self._nvml, self._device = nvml, device
        self._name = ask(nvml, "nvmlDeviceGetName", device.handle)
        self._sample = self._gpm_sample() if self._has_gpm() else None
        self._energy = self._energy_now() if power else None
        self._start = time.time()

    def percent(self):
        percent = self._gpm_percent() or {"gpu_util": self._sampled_util()}
        return {name: value for name, value in percent.items() if value is not None}

    def read(self):
        percent = self.percent()
        memory = ask(self._nvml, "nvmlDeviceGetMemoryInfo", self._device.handle)
        return Reading(
            name=self._name,
            power_w=self._power(),
            memory_used_mb=memory and memory.used / _MIB,
            memory_total_mb=memory and memory.total / _MIB,
            memory_process_mb=self._process_memory(),
            **{name: percent.get(name) for name in _GPM_METRICS},
        )

    def _has_gpm(self):
        gpu = self._device.parent or self._device.handle
        support = ask(self._nvml, "nvmlGpmQueryDeviceSupport", gpu)
        if support is not None and support.isSupportedDevice:
            return True
        say_once(f"NVML has no GPM counters for {self._name}", "tensor_core_util")
        return False

    def _gpm_sample(self):
        try:
            return _Sample(self._nvml, self._device)
        except Exception as error:
            reason = f"NVML's GPM counters of {self._name} cannot be read ({error})"
            say_once(reason, "tensor_core_util")
            return None

    def _gpm_percent(self):
        end = self._gpm_sample() if self._sample else None
        if end is None:
            return {}
        request = self._nvml.c_nvmlGpmMetricsGet_t()
        request.version = self._nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(_GPM_METRICS)
        request.sample1, request.sample2 = self._sample.handle, end.handle
        for slot, metric in zip(request.metrics, _GPM_METRICS.values(), strict=False):
            slot.metricId = metric
        answer = ask(self._nvml, "nvmlGpmMetricsGet", request)
        slots = zip(_GPM_METRICS, answer.metrics if answer else (), strict=False)
        return {n: s.value for n, s in slots if not s.nvmlReturn and _is_number(s)}

    def _sampled_util(self):
        """Mean of the driver's samples since the start, else the present value.

        The driver keeps about the last 20 seconds.
        """
        handle, kind = self._device.handle, 1  # NVML_GPU_UTILIZATION_SAMPLES
        since = int(self._start * 1e6)
        answer = ask(self._nvml, "nvmlDeviceGetSamples", handle, kind, since)
        if answer and answer[1]:
            field = _SAMPLE_FIELDS[answer[0]]
            values = [getattr(s.sampleValue, field) for s in answer[1]]
            return sum(values) / len(values)
        rates = ask(self._nvml, "nvmlDeviceGetUtilizationRates", handle)
        return None if rates is None else float(rates.gpu)

    def _energy_now(self):
        handle = self._device.handle
        return ask(self._nvml, "nvmlDeviceGetTotalEnergyConsumption", handle)

    def _power(self):
        seconds = time.time() - self._start
        # The counter moves every 20 to 100 ms.
        if self._energy is not None and seconds > 1:
            energy = self._energy_now()
            if energy is not None:
                return (energy - self._energy) / 1e3 / seconds
        milliwatts = ask(self._nvml, "nvmlDeviceGetPowerUsage", self._device.handle)
        return milliwatts and milliwatts / 1e3

    def _process_memory(self):
        list_processes = "nvmlDeviceGetComputeRunningProcesses"
        processes = ask(self._nvml, list_processes, self._device.handle) or ()
        # A container with process ids of its own does not find itself here.
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return sum(own) / _MIB if own and None not in own else None


class _Sample:
    """GPM's raw counters of one device at one moment, freed with this object."""

    def __init__(self, nvml, device):
        self.handle = nvml.nvmlGpmSampleAlloc()
        weakref.finalize(self, ask, nvml, "nvmlGpmSampleFree", self.handle)
        if device.parent is None:
            nvml.nvmlGpmSampleGet(device.handle, self.handle)
        else:
            instance = nvml.nvmlDeviceGetGpuInstanceId(device.handle)
            nvml.nvmlGpmMigSampleGet(device.parent, instance, self.handle)


def _is_number(slot):
    return math.isfinite(slot.value)
