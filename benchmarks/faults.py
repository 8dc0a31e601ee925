"""A fault campaign: what each kind of overflow leaves behind, in ours and in Keras's.

    KERAS_BACKEND=tensorflow python benchmarks/faults.py --out faults.jsonl
    KERAS_BACKEND=jax python benchmarks/faults.py --out faults.jsonl
    KERAS_BACKEND=torch python benchmarks/faults.py --out faults.jsonl
    python benchmarks/faults.py --table faults.jsonl > docs/faults.md

For each fault a small network is trained, struck, and trained on. Two numbers count:
`non_finite`, the weights, slots, averages and statistics that end non-finite, the scale
among them; and `changed`, the entries that the skipped step left different
from before it, bit for bit, the loss-scale state and the random seeds excepted.
"""

import argparse
import json
import pathlib

import keras
import numpy as np
from keras import ops

import keras_mixprec as mp
from keras_mixprec import compile_hook

WRAPPERS = {
    "ours": mp.LossScaleOptimizer,
    "Keras": keras.optimizers.LossScaleOptimizer,
}
ALLOWED = (
    "step_counter",
    "dynamic_scale",
    "hysteresis_left",
    "overflow_count",
    "consecutive_overflows",
    "seed",
)
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "averaging": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    "decaying": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipping": lambda: keras.optimizers.Adam(0.01, global_clipnorm=1.0),
}


class Spike(keras.layers.Layer):
    """Passes its input on; where that is exactly 777, its gradient is infinite."""

    def call(self, x):
        # The derivative of sqrt at 0, as a real network would meet it.
        zero = ops.where(ops.equal(x, 777.0), x - 777.0, ops.ones_like(x))
        return x + (ops.sqrt(zero) - ops.sqrt(ops.stop_gradient(zero)))


def gradient_overflow(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 0, 777.0, x)


def forward_overflow(x):
    return x * 0 + 1e6


def nan_input(x):
    return x * np.nan


# fault -> what becomes of a batch, the optimizer, bad steps, growth steps
FAULTS = {
    "gradient overflow": (gradient_overflow, "adam", 1, 2000),
    "forward overflow": (forward_overflow, "adam", 1, 2000),
    "NaN input": (nan_input, "adam", 1, 2000),
    "500 bad steps in a row": (forward_overflow, "adam", 500, 2000),
    "300 growths": (None, "adam", 300, 1),
    "while accumulating gradients": (forward_overflow, "accumulating", 1, 2000),
    "while averaging weights": (forward_overflow, "averaging", 1, 2000),
    "with AdamW decay": (forward_overflow, "decaying", 1, 2000),
    "with global clipping": (forward_overflow, "clipping", 1, 2000),
}


def build(wrapper: str, optimizer: str, growth_steps: int) -> keras.Model:
    """Return a compiled mixed_float16 network, as the wrapper's users have it.

    Args:
        wrapper: `"ours"` or `"Keras"`.
        optimizer: A key of `OPTIMIZERS`.
        growth_steps: Int, finite steps before the scale grows.
    """
    (compile_hook.put if wrapper == "ours" else compile_hook.remove)()
    keras.utils.set_random_seed(0)
    half = {"dtype": "mixed_float16"}
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, **half),
            Spike(**half),
            keras.layers.BatchNormalization(**half),
            keras.layers.ReLU(**half),
            keras.layers.Dropout(0.1, seed=1, **half),
            keras.layers.Dense(3, activation="softmax", dtype="float32"),
        ]
    )
    # A kernel that hands the planted value of 777 through to the spike.
    kernel = model.layers[0].kernel
    kernel.assign(ops.eye(8, 16, dtype=kernel.dtype))
    inner = OPTIMIZERS[optimizer]()
    inner.learning_rate = 0.0 if optimizer != "decaying" else 0.01
    model.compile(
        WRAPPERS[wrapper](inner, dynamic_growth_steps=growth_steps),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def state(model: keras.Model) -> dict[str, np.ndarray]:
    """Return position and path -> value of weights, statistics and optimizer state."""
    kept = model.weights + model.optimizer.variables
    return {
        f"{i} {v.path}": np.array(ops.convert_to_numpy(v)) for i, v in enumerate(kept)
    }


def strike(wrapper: str, fault: str) -> dict:
    """Train, strike with one fault, train on. Returns the row.

    Args:
        wrapper: `"ours"` or `"Keras"`.
        fault: A key of `FAULTS`.
    """
    spoil, optimizer, steps, growth_steps = FAULTS[fault]
    model = build(wrapper, optimizer, growth_steps)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    for _ in range(3):
        model.train_on_batch(x, y)
    before = state(model)
    bad = x if spoil is None else spoil(x).astype("float32")
    for _ in range(steps):
        model.train_on_batch(bad, y)
    changed = 0 if spoil is None else count_changed(before, state(model))
    for _ in range(2):
        model.train_on_batch(x, y)
    final = state(model)
    return {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "wrapper": wrapper,
        "fault": fault,
        "non_finite": sum(int((~np.isfinite(v)).sum()) for v in final.values()),
        "changed": changed,
    }


def count_changed(before: dict, after: dict) -> int:
    """Return how many entries differ in a bit, scale, counters and seeds excepted."""
    return sum(
        before[name].tobytes() != after[name].tobytes()
        for name in before
        if not any(word in name for word in ALLOWED)
    )


def table(rows: list[dict]) -> str:
    """Return the campaign as a Markdown page.

    Args:
        rows: What `strike` returned.
    """
    lines = [
        "# What an overflow leaves behind",
        "",
        "Made by `benchmarks/faults.py`. In each cell: non-finite values left in "
        "weights, optimizer state and statistics after the fault and two clean steps "
        "/ entries of that state that the skipped step itself changed. Both must be "
        "0. The loss-scale state and random seeds are the only entries that a skipped "
        "step may change.",
        "",
    ]
    found = {(r["fault"], r["backend"], r["wrapper"]): r for r in rows}
    columns = [(b, w) for b in ("tensorflow", "jax", "torch") for w in WRAPPERS]
    columns = [c for c in columns if any(k[1:] == c for k in found)]
    lines.append("| fault | " + " | ".join(f"{b}, {w}" for b, w in columns) + " |")
    lines.append("|-" * (len(columns) + 1) + "|")
    for fault in FAULTS:
        cells = [found.get((fault, *c)) for c in columns]
        shown = [f"{r['non_finite']} / {r['changed']}" if r else "" for r in cells]
        lines.append(f"| {fault} | " + " | ".join(shown) + " |")
    lines += ["", f"Keras {rows[0]['keras']}, on a CPU.", ""]
    return "\n".join(lines)


def main() -> int:
    """Run the campaign, or print its table. Returns 1 if ours left anything behind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    parser.add_argument("--table", help="print the rows of this file as Markdown")
    options = parser.parse_args()
    if options.table:
        lines = pathlib.Path(options.table).read_text().splitlines()
        print(table([json.loads(line) for line in lines]))
        return 0
    failed = 0
    for fault in FAULTS:
        for wrapper in WRAPPERS:
            row = strike(wrapper, fault)
            failed += wrapper == "ours" and bool(row["non_finite"] or row["changed"])
            print(json.dumps(row), flush=True)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
