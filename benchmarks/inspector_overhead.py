"""Time a training step with and without `OverflowInspector` looking at it.

    python benchmarks/inspector_overhead.py [--backends jax torch tensorflow]
    KERAS_BACKEND=jax python benchmarks/inspector_overhead.py --worker [--size small]

Each backend gets a process of its own and `--timeout` seconds. It trains BERT-base's
encoder (`models.py`) in mixed_float16 on one batch, over and over: first until both
train functions are compiled, then in blocks of `--steps`, plain and looked at in turns,
each with one read of the device at its end, which for a block that is looked at
includes what was measured. A line of JSON per pair of blocks, with the medians so far.
No more pairs after `--seconds`, counted from the start, or from the go-ahead with
`--wait-for-turn`.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from rows import add_turn
from rows import wait_for_turn

_HERE = pathlib.Path(__file__).resolve().parent
# Pairs of blocks that a median takes at least.
_PAIRS = 3


def worker(given):
    """Print a line of JSON for each pair of blocks, on this process's backend."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    started = time.perf_counter()
    if os.environ.get("KERAS_BACKEND") == "torch":
        # Imported after TensorFlow in one process, torch may segfault.
        import torch  # noqa: F401
    import keras
    from models import build

    import keras_mixprec as mp

    mp.set_policy(given.policy)
    workload = build("bert", given.size, given.batch)
    model = workload.model
    model.compile(
        mp.LossScaleOptimizer("adam"), workload.loss, jit_compile=_jit_compile(given)
    )
    samples = workload.batch * given.steps
    x, y = (_repeated(a, samples) for a in (workload.x, workload.y))

    class Blocks(keras.callbacks.Callback):
        """Seconds of each epoch until the device has finished."""

        def __init__(self):
            super().__init__()
            self.seconds, self.since = [], started

        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            keras.ops.convert_to_numpy(self.model.trainable_variables[-1])
            self.seconds.append(time.perf_counter() - self.start)
            if epoch == 1:
                print(json.dumps({"compiled_s": _since(started)}), flush=True)
                if given.wait_for_turn:
                    wait_for_turn()
                    self.since = time.perf_counter()
            if epoch >= 3 and epoch % 2:
                row = _row(self.seconds[2:], given.steps)
                print(json.dumps(description | row), flush=True)
            late = _since(self.since) > given.seconds
            if late and len(self.seconds) >= 2 + 2 * _PAIRS:
                self.model.stop_training = True

    description = {
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "model": "bert",
        "policy": given.policy,
        "size": given.size,
        "batch": workload.batch,
        "jit_compile": bool(model.jit_compile),
        "device": _device(),
        "date": datetime.date.today().isoformat(),
    }
    # The first of each kind compiles, and is left out.
    looked_at = range(1, 2 + 2 * given.pairs, 2)
    inspector = mp.OverflowInspector(epochs=looked_at, batches=range(given.steps))
    fit = {"batch_size": workload.batch, "shuffle": False, "verbose": 0}
    epochs = 2 + 2 * given.pairs
    # The clock stands last, so that it sees the inspector read.
    model.fit(x, y, epochs=epochs, callbacks=[inspector, Blocks()], **fit)
    frame = inspector.report.frames[-1]
    print(json.dumps({"tensors": len(frame.ranges), "culprit": frame.culprit()}))


def _row(seconds, steps):
    plain, looked_at = seconds[::2], seconds[1::2]
    ratios = [b / a for a, b in zip(plain, looked_at, strict=True)]
    return {
        "pairs": len(ratios),
        "plain_ms": round(1e3 * statistics.median(plain) / steps, 2),
        "looked_at_ms": round(1e3 * statistics.median(looked_at) / steps, 2),
        "paired_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _repeated(array, samples):
    import numpy as np

    return np.resize(array, (samples, *array.shape[1:]))


def _device():
    from keras_mixprec.backend import engine

    found = engine.accelerator()
    return "cpu" if found is None else f"{found[0]} {found[1]}"


def _jit_compile(given):
    return "auto" if given.jit_compile is None else given.jit_compile == "yes"


def _arguments(given):
    names = ("size", "batch", "policy", "steps", "pairs", "jit_compile", "seconds")
    pairs = [(f"--{n.replace('_', '-')}", getattr(given, n)) for n in names]
    return [str(part) for pair in pairs if pair[1] is not None for part in pair]


def _since(start):
    return round(time.perf_counter() - start, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="*", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--size", default="full", choices=["full", "small"])
    parser.add_argument("--batch", type=int)
    # JAX on a CPU cannot train attention in float16.
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--jit-compile", choices=["yes", "no"])
    parser.add_argument("--seconds", type=float, default=60, help="then no more pairs")
    parser.add_argument("--timeout", type=float, default=120, help="per backend")
    add_turn(parser)
    given = parser.parse_args()
    if given.wait_for_turn and not given.worker:
        parser.error("--wait-for-turn is one backend's: give --worker as well.")
    if given.worker:
        worker(given)
        return 0
    codes = []
    for backend in given.backends:
        # A process per backend: one holds the whole memory of a GPU.
        environment = {**os.environ, "KERAS_BACKEND": backend}
        arguments = [
            a for a in sys.argv[1:] if a not in ("--backends", *given.backends)
        ]
        command = [sys.executable, "-u", str(_HERE / "inspector_overhead.py")]
        try:
            code = subprocess.run(
                [*command, "--worker", *arguments],
                env=environment,
                timeout=given.timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        print(json.dumps({"backend": backend, "exit": code}), flush=True)
        codes.append(code)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
