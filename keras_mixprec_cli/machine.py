"""What this machine is and what half precision gains on it: `doctor`'s facts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from typing import Any

import keras

import keras_mixprec
from keras_mixprec import hardware
from keras_mixprec import nvml
from keras_mixprec.backend import engine

_PACKAGES = ("keras-mixprec", "keras", "tensorflow", "jax", "torch", "numpy")
# What is optional: module, what it is for, what installs it.
_OPTIONAL = (
    ("pynvml", "gpu_util and tensor_core_util in the logs", "gpu"),
    ("matplotlib", "`keras-mixprec report`", "report"),
    ("jinja2", "`keras-mixprec report`", "report"),
)
_DTYPES = {
    "float32": "what others are compared with; on GPUs since Ampere it may mean TF32",
    "float16": "needs loss scaling: 6e-8 to 65504 is all it holds",
    "bfloat16": "needs none: float32's range, but two digits instead of seven",
}
# Large enough to keep a GPU busy, small enough for a CPU that emulates float16.
_SIZE = {True: 4096, False: 256}
_ROUNDS = 12
_PRODUCTS = 5


def facts(measure: bool = True) -> dict[str, Any]:
    """Return all that `doctor` prints.

    Args:
        measure: Whether to time a matrix product in each precision.
    """
    policy, reason = hardware.best_policy()
    works, note = engine.xla()
    rows = precisions(measure)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": keras.backend.backend(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": devices(),
        "best_policy": policy,
        "reason": reason,
        "xla": {"works": works, "note": note},
        "precisions": rows,
        "advice": advice(policy, reason, rows),
        "missing": missing(),
    }


def advice(policy: str, reason: str, rows: list[dict[str, Any]]) -> str:
    """Return which policy to use: what "auto" takes, unless it was measured slower.

    Args:
        policy: What `"auto"` takes, from what the hardware says of itself.
        reason: Why.
        rows: What `precisions` returned.
    """
    dtype = policy.removeprefix("mixed_")
    row = next(row for row in rows if row["dtype"] == dtype)
    if row.get("error"):
        return (
            f'Use float32 here: "auto" would take {policy} ({reason}), but a product '
            f"in {dtype} failed: {row['error']}."
        )
    speedup = row["speedup"]
    # Within a tenth it may be noise.
    if speedup is None or speedup > 0.9:
        return f"Use {policy} here: {reason}."
    return (
        f'Use float32 here: "auto" would take {policy} ({reason}), but a product in '
        f"{dtype} was measured to run at {speedup:.2f} times float32's speed. What "
        "half precision still saves is memory."
    )


def devices() -> list[dict[str, Any]]:
    """Return the accelerators that the backend sees, and the CPU."""
    kind, capability = engine.accelerator() or (None, None)
    version = ".".join(map(str, capability)) if capability else None
    found = [
        {"device": name, "kind": kind, "compute_capability": version, "name": model}
        for name, model in zip(engine.memory_info(), _gpu_names(), strict=False)
    ]
    cpu = {
        "device": f"CPU, {os.cpu_count()} cores",
        "kind": "cpu",
        "compute_capability": None,
        "name": hardware.cpu_bfloat16_units() or "no bfloat16 units",
    }
    return [*found, cpu]


def _gpu_names():
    library = nvml.load() if engine.memory_info() else None
    if library is not None:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        for device in nvml.visible_devices(library, shown):
            name = nvml.ask(library, "nvmlDeviceGetName", device.handle)
            yield name.decode() if isinstance(name, bytes) else name
    while True:
        yield None


def precisions(measure: bool) -> list[dict[str, Any]]:
    """Return each dtype's bytes and what to know and, measured here, its speed.

    Args:
        measure: Whether to time a matrix product.
    """
    size = _SIZE[engine.accelerator() is not None]
    times, errors = _timed_products(size) if measure else ({}, {})
    return [
        {
            "dtype": dtype,
            "bytes": 4 if dtype == "float32" else 2,
            "product_size": size if measure else None,
            "product_ms": times.get(dtype),
            "speedup": times["float32"] / times[dtype] if dtype in times else None,
            "note": note,
            "error": errors.get(dtype),
        }
        for dtype, note in _DTYPES.items()
    ]


def _timed_products(size: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return dtype -> ms of one size x size x size product, or why there is none.

    The best of several rounds that take turns, so that all meet the same machine.
    """
    times, errors = {}, {}
    for i in range(_ROUNDS):
        for dtype in [d for d in _DTYPES if d not in errors]:
            try:
                ms = _milliseconds(keras.ops.ones((size, size), dtype))
            # Whatever the backend raises for a precision that the device lacks.
            except Exception as error:
                errors[dtype] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                times.pop(dtype, None)
                continue
            # The first round compiles.
            times[dtype] = min(ms, times[dtype]) if i > 1 else ms
    return times, errors


def _milliseconds(x):
    _wait_for(x)
    start = time.perf_counter()
    products = [keras.ops.matmul(x, x) for _ in range(_PRODUCTS)]
    _wait_for(products[-1])
    return (time.perf_counter() - start) * 1000 / _PRODUCTS


def _wait_for(x):
    keras.ops.convert_to_numpy(keras.ops.cast(x[0, 0], "float32"))


def missing() -> list[dict[str, str]]:
    """Return what is not installed or does not answer: what, what for, what to do."""
    found = [
        {"what": module, "for": use, "do": f'pip install "keras-mixprec[{extra}]"'}
        for module, use, extra in _OPTIONAL
        if importlib.util.find_spec(module) is None
    ]
    if engine.accelerator() is None:
        found.append(
            {
                "what": f"an accelerator that {keras.backend.backend()} sees",
                "for": "speed: half precision is rarely faster on a CPU",
                "do": "On a machine with a GPU, install the backend's build for it",
            }
        )
    return found


def _version(name):
    if name == "keras-mixprec":
        return keras_mixprec.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
