"""Time a training step with and without `OverflowInspector` looking at it.

    KERAS_BACKEND=jax python benchmarks/inspector_overhead.py [--size small]
    python benchmarks/run_matrix.py --rows inspector --jobs 3 --together

Trains BERT-base's encoder (`models.py`) in mixed_float16 on one batch, over and over:
first until both train functions are compiled, then in blocks of `--steps`, plain and
looked at in turns, each with one read of the device at its end, which for a block that
is looked at includes what was measured. A line of JSON for each pair of blocks, with
the medians so far, so that a run that is cut off has measured something. No more pairs
after `--seconds`, counted from the start of timing.
"""

import argparse
import os
import statistics
import time

if os.environ.get("KERAS_BACKEND") == "torch":
    # Imported after TensorFlow in one process, torch may segfault.
    import torch  # noqa: F401

import keras
import numpy as np
from backends import current
from backends import versions
from models import build
from rows import add_turn
from rows import emit
from rows import place
from rows import wait_for_turn
from shapes import SIZES

import keras_mixprec as mp

# Epochs that are left out: two that compile, and two after the others' turns.
_WARM_UP = 4
# Pairs of blocks that a median takes at least.
_PAIRS = 3


class Blocks(keras.callbacks.Callback):
    """Times epochs, plain and looked at in turns, and prints what they took so far.

    Args:
        described: Dict, the fields of a row that no measurement changes.
        options: Namespace of the command line.
    """

    def __init__(self, described: dict, options: argparse.Namespace):
        super().__init__()
        self.described, self.options = described, options
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stop it once the device has finished."""
        keras.ops.convert_to_numpy(self.model.trainable_variables[-1])
        self.seconds.append(time.perf_counter() - self.start)
        if epoch == 1:
            wait_for_turn(self.options.wait_for_turn)
            self.since = time.perf_counter()
        if epoch == _WARM_UP - 1:
            self.seconds.clear()
        elif epoch >= _WARM_UP and epoch % 2:
            row = ratios(self.seconds, self.options.steps)
            emit(self.described | row, self.options.out)
            late = time.perf_counter() - self.since > self.options.seconds
            if late and row["pairs_of_blocks"] >= _PAIRS:
                self.model.stop_training = True


def ratios(seconds: list[float], steps: int) -> dict:
    """Return the timing fields of a row.

    Args:
        seconds: List of floats: of a plain block, one looked at, a plain one, ...
        steps: Int, steps in a block.
    """
    plain, looked_at = seconds[::2], seconds[1::2]
    each = [b / a for a, b in zip(plain, looked_at, strict=True)]
    return {
        "pairs_of_blocks": len(each),
        "ms_plain": round(1000 * statistics.median(plain) / steps, 2),
        "ms_looked_at": round(1000 * statistics.median(looked_at) / steps, 2),
        "paired_ratio": round(statistics.median(each), 3),
        "ratio_min": round(min(each), 3),
        "ratio_max": round(max(each), 3),
    }


def measure(options: argparse.Namespace) -> None:
    """Train, and print a row for each pair of blocks."""
    backend = current()
    mp.set_policy(options.policy)
    workload = build("bert", options.size, options.batch)
    model = workload.model
    jit = {None: "auto", "yes": True, "no": False}[options.jit_compile]
    model.compile(mp.LossScaleOptimizer("adam"), workload.loss, jit_compile=jit)
    samples = workload.batch * options.steps
    x, y = (np.resize(a, (samples, *a.shape[1:])) for a in (workload.x, workload.y))
    described = {
        "benchmark": "inspector",
        "model": "bert",
        "size": options.size,
        "backend": keras.backend.backend(),
        "policy": options.policy,
        "xla": bool(model.jit_compile),
        "batch": workload.batch,
        "steps_per_block": options.steps,
        **place(backend.device(), versions(backend)),
    }
    epochs = _WARM_UP + 2 * options.pairs
    inspector = mp.OverflowInspector(
        epochs=range(1, epochs, 2), batches=range(options.steps)
    )
    model.fit(
        x,
        y,
        batch_size=workload.batch,
        shuffle=False,
        verbose=0,
        epochs=epochs,
        # The clock stands last, so that it sees the inspector read.
        callbacks=[inspector, Blocks(described, options)],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--batch", type=int, help="samples per step")
    # JAX on a CPU cannot train attention in float16.
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of blocks at most")
    parser.add_argument("--jit-compile", choices=["yes", "no"])
    parser.add_argument("--seconds", type=float, default=60, help="then no more pairs")
    add_turn(parser)
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    measure(parse())
