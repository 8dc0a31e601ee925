"""What this machine is, how much memory is in use, and how busy it is."""

import json
import pathlib

from keras_mixprec import nvml
from keras_mixprec.activity import Activity
from keras_mixprec.activity import Reading
from keras_mixprec.backend import engine

_MIB = 2**20


def best_policy() -> tuple[str, str]:
    """Return the fastest safe policy for this machine, and the reason.

    Tensor cores came with compute capability 7.0 (NVIDIA, "Volta Architecture
    Whitepaper", 2017).
    """
    kind, capability = engine.accelerator() or ("cpu", None)
    if kind == "tpu":
        return "mixed_bfloat16", "a TPU computes in bfloat16"
    if kind == "gpu":
        version = ".".join(map(str, capability))
        if capability >= (7, 0):
            return "mixed_float16", f"GPU of compute capability {version}, >= 7.0"
        return "float32", f"GPU of compute capability {version} has no tensor cores"
    units = cpu_bfloat16_units()
    if units:
        return "mixed_bfloat16", f"no accelerator, but a CPU with {units}"
    return "float32", "no accelerator, and a CPU without bfloat16 units"


def has_bfloat16() -> bool:
    """Whether this machine multiplies in bfloat16.

    Tensor cores do from compute capability 8.0 on (NVIDIA, "A100 Tensor Core GPU
    Architecture", 2020).
    """
    kind, capability = engine.accelerator() or ("cpu", None)
    if kind == "gpu":
        return capability >= (8, 0)
    return kind == "tpu" or cpu_bfloat16_units() is not None


def cpu_bfloat16_units(cpuinfo: str = "/proc/cpuinfo") -> str | None:
    """Return the CPU's bfloat16 extension, or `None` (also where unknown).

    Args:
        cpuinfo: Path of the kernel's CPU description.
    """
    path = pathlib.Path(cpuinfo)
    words = set(path.read_text().split()) if path.exists() else set()
    # x86's flags, then 64-bit Arm's.
    return next((u for u in ("amx_bf16", "avx512_bf16", "bf16") if u in words), None)


def gpu_memory() -> dict[str, tuple[float, float]]:
    """Return device -> (MiB in use, MiB at the peak), from the backend's counters."""
    return {
        name: (used / _MIB, peak / _MIB)
        for name, (used, peak) in engine.memory_info().items()
    }


def host_memory() -> float:
    """Return the resident memory of this process in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / _MIB


def memory_logs() -> dict[str, float]:
    """Return memory in MiB: `gpu_memory_mb` and `gpu_memory_peak_mb`.

    Summed over devices; of each too (`gpu_memory_mb_0`, ...) where there are several.
    `host_memory_mb` instead where there is no accelerator.
    """
    devices = gpu_memory()
    if not devices:
        return {"host_memory_mb": host_memory()}
    logs = {
        "gpu_memory_mb": sum(used for used, _ in devices.values()),
        "gpu_memory_peak_mb": sum(peak for _, peak in devices.values()),
    }
    if len(devices) > 1:
        for i, (used, peak) in enumerate(devices.values()):
            logs |= {f"gpu_memory_mb_{i}": used, f"gpu_memory_peak_mb_{i}": peak}
    return logs


def memory_over_processes(logs: dict[str, float]) -> dict[str, float]:
    """Return sums over the processes that train together; {} in a process alone.

    Nobody waits: of each process counts what it last passed here, of one that has not
    been here yet nothing.

    Args:
        logs: What `memory_logs` returned in this process.
    """
    own = {key: mib for key, mib in logs.items() if key.endswith("_mb")}
    notes = [json.loads(note) for note in engine.last_notes(json.dumps(own))]
    if not notes:
        return {}
    return {
        f"{key.removesuffix('_mb')}_total_mb": sum(note.get(key, 0) for note in notes)
        for key in own
    }


def reset_peak_memory() -> bool:
    """Start the memory peak anew. Returns whether the backend can."""
    return engine.reset_peak_memory()


def start_activity(power: bool = True) -> Activity | None:
    """Start measuring the GPUs; `None` where there is none, or no NVML.

    Args:
        power: Bool, whether `read_devices` is to tell the mean power since now, at some
            3 ms. Else it tells the present power. Defaults to `True`.
    """
    nvml_module = nvml.load() if engine.memory_info() else None
    return Activity(nvml_module, power) if nvml_module else None


def read_devices(start: Activity | None) -> list[Reading]:
    """Return what NVML says of each GPU that this process uses.

    A process sees every GPU that CUDA shows it; those it has memory on are used.

    Args:
        start: What `start_activity` returned.
    """
    return _of_used_devices(start.read()) if start else []


def _of_used_devices(found):
    peaks = [peak for _, peak in engine.memory_info().values()]
    if len(peaks) != len(found) or not any(peaks):
        return found
    return [of_device for of_device, peak in zip(found, peaks, strict=True) if peak]


def read_activity(start: Activity | None) -> dict[str, float]:
    """Return `gpu_util` and `tensor_core_util` since `start`.

    In percent of the time, the mean over the GPUs that this process uses; of each
    too (`gpu_util_0`, ...) where there are several. Keys without an answer are absent.

    Args:
        start: What `start_activity` returned.
    """
    devices = _of_used_devices(start.percent()) if start else []
    logs = {}
    for key in ("gpu_util", "tensor_core_util"):
        known = {i: d[key] for i, d in enumerate(devices) if key in d}
        if known:
            logs[key] = sum(known.values()) / len(known)
        if len(devices) > 1:
            logs |= {f"{key}_{i}": v for i, v in known.items()}
    return logs
