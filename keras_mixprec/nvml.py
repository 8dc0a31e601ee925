"""NVML, asked so that it never raises, and the devices that CUDA shows this process."""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Iterator
from typing import Any

_logger = logging.getLogger("keras_mixprec")


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, or a MIG slice of one.

    Args:
        handle: NVML's handle.
        parent: NVML's handle of the GPU that a slice belongs to, `None` for a GPU.
    """

    handle: Any
    parent: Any = None


@functools.cache
def load() -> types.ModuleType | None:
    """Return pynvml with NVML initialised, or `None`; says once why."""
    try:
        import pynvml
    except ImportError:
        say_once("nvidia-ml-py is not installed (`pip install keras_mixprec[gpu]`)")
        return None
    try:
        pynvml.nvmlInit()
    except Exception as error:
        say_once(f"NVML does not answer ({error})")
        return None
    return pynvml


@functools.cache
def say_once(reason: str, keys: str = "gpu_util and tensor_core_util") -> None:
    """Log once why log keys are missing.

    Args:
        reason: What does not answer.
        keys: The log keys.
    """
    _logger.warning("%s: %s will not be logged.", reason, keys)


def ask(nvml: types.ModuleType, function: str, *args: Any) -> Any:
    """Return what an NVML function answers, `None` where it fails.

    An old library lacks functions, an old driver their entry points, a container the
    permission.

    Args:
        nvml: The module `pynvml`.
        function: The function's name.
        *args: Its arguments.
    """
    try:
        return getattr(nvml, function)(*args)
    # Whatever goes wrong, a missing measurement must not end a training run.
    except Exception:
        return None


def visible_devices(nvml: types.ModuleType, visible: str | None) -> list[Device]:
    """Return the devices that CUDA shows this process, in CUDA's order.

    As CUDA reads `CUDA_VISIBLE_DEVICES` (CUDA C++ Programming Guide, "CUDA
    Environment Variables"): indices, UUIDs or their beginnings, MIG names; the first
    name of nothing ends the list; a GPU in MIG mode stands for its first slice.
    Indices count in PCI order, CUDA's order wherever all GPUs are of one kind.

    Args:
        nvml: The module `pynvml`, initialised.
        visible: The variable's value, `None` where it is not set.
    """
    indices = range(ask(nvml, "nvmlDeviceGetCount") or 0)
    gpus = [ask(nvml, "nvmlDeviceGetHandleByIndex", i) for i in indices]
    gpus = [Device(handle) for handle in gpus if handle is not None]
    if visible is None:
        visible = ",".join(map(str, range(len(gpus))))
    found: list[Device] = []
    for name in visible.split(","):
        device = _device_named(nvml, gpus, name.strip())
        if device is None:
            break
        found.append(next(_slices(nvml, device), device))
    return found


def _device_named(nvml, gpus, name):
    if name.isdigit():
        return gpus[int(name)] if int(name) < len(gpus) else None
    if not name.startswith(("GPU-", "MIG-")):
        return None
    slices = (s for gpu in gpus for s in _slices(nvml, gpu))
    candidates = [*gpus, *slices]
    matches = (d for d in candidates if any(map(_begins(name), _names(nvml, d))))
    return next(matches, None)


def _begins(start):
    return lambda name: name is not None and name.startswith(start)


def _names(nvml, device) -> Iterator[str | None]:
    yield ask(nvml, "nvmlDeviceGetUUID", device.handle)
    if device.parent is not None:
        # The name of drivers before R470, still understood.
        gpu = ask(nvml, "nvmlDeviceGetUUID", device.parent)
        instance = ask(nvml, "nvmlDeviceGetGpuInstanceId", device.handle)
        yield f"MIG-{gpu}/{instance}/" + str(
            ask(nvml, "nvmlDeviceGetComputeInstanceId", device.handle)
        )


def _slices(nvml, gpu) -> Iterator[Device]:
    if gpu.parent is not None:
        return
    for i in range(ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", gpu.handle) or 0):
        handle = ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", gpu.handle, i)
        if handle is not None:
            yield Device(handle, gpu.handle)
