"""Print what NVML reads of a float16 and of a float32 matrix product on a GPU.

    python benchmarks/nvml_check.py [--seconds 3] [--size 8192]

Needs torch with CUDA and nvidia-ml-py. Without Keras, the modules that do not need
it are read from beside this script.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys
import time
import types

import torch

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "keras_mixprec"


def load_activity():
    """Return `start`, `read`: the package's own where Keras is installed."""
    if importlib.util.find_spec("keras") is None:
        return load_without_keras()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    sys.path.insert(0, str(PACKAGE.parent))
    from keras_mixprec import hardware

    def show(start):
        print("  logs:", hardware.read_activity(start))
        return hardware.read_devices(start)

    return hardware.start_activity, show


def load_without_keras():
    """Return `start`, `read` over NVML alone."""
    package = types.ModuleType("keras_mixprec")
    package.__path__ = [str(PACKAGE)]
    sys.modules["keras_mixprec"] = package
    from keras_mixprec import activity
    from keras_mixprec import nvml

    print("Keras is not installed: reading every visible device.")
    library = nvml.load()
    start = (lambda: activity.Activity(library)) if library else (lambda: None)
    return start, lambda started: started.read() if started else []


def multiply(dtype, size, seconds):
    """Run matrix products on the present GPU for so long; print TFLOP/s."""
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    out = torch.empty_like(a)
    end, products = time.time() + seconds, 0
    while time.time() < end:
        for _ in range(4):
            torch.mm(a, a, out=out)
        torch.cuda.synchronize()
        products += 4
    print(f"  {2 * size**3 * products / seconds / 1e12:.1f} TFLOP/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=8192)
    arguments = parser.parse_args()
    start, read = load_activity()
    torch.set_float32_matmul_precision("highest")
    for name in ("float16", "float32", "idle"):
        dtype = None if name == "idle" else getattr(torch, name)
        if dtype is not None:
            multiply(dtype, arguments.size, 0.5)
        print(name)
        started, began = start(), time.perf_counter()
        print(f"  start: {1e3 * (time.perf_counter() - began):.2f} ms")
        if dtype is None:
            time.sleep(arguments.seconds)
        else:
            multiply(dtype, arguments.size, arguments.seconds)
        began = time.perf_counter()
        for reading in read(started):
            print("  ", dataclasses.asdict(reading))
        print(f"  read: {1e3 * (time.perf_counter() - began):.2f} ms")


if __name__ == "__main__":
    main()
