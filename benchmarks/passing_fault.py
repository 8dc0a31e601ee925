"""A training whose attention logits are hot for a while: does the plan settle?

    KERAS_BACKEND=jax python passing_fault.py --out results/trainings/cpu.jsonl
    KERAS_BACKEND=jax python passing_fault.py --runs adaptive --seeds 1 --picture x.png

Attention over the rows of scikit-learn's digits. In epochs 5 to 12 of 36 the logits are
100,000 times what they should be, beyond float16's 65504. Trains in float32, in half
with the plan as it is, and with `AdaptivePrecision`; prints a line of JSON per run.
`report_trainings.py` writes them into docs/trainings.md. On models this small torch is
six times as fast with `OMP_NUM_THREADS=1`.
"""

import argparse
import os
import time

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch  # noqa: F401

import backends
import keras
from keras import layers
from keras import ops
from rows import emit
from rows import place
from trainings import RUNS
from trainings import digits

import keras_mixprec as mp

EPOCHS, BATCH, WIDTH = 36, 32, 32
# From 1, first and last; all in the first third.
FAULT = (5, 12)
HOT = 1e5


class Attention(layers.Layer):
    """Attention whose logits a callback can heat."""

    def build(self, shapes):
        self.heat = self.add_weight(
            shape=(), initializer="ones", trainable=False, autocast=False
        )

    def call(self, queries, keys, values):
        logits = ops.matmul(queries, ops.transpose(keys, (0, 2, 1))) / WIDTH**0.5
        weights = ops.softmax(logits * ops.cast(self.heat, logits.dtype))
        return ops.matmul(weights, values)


class Heat(keras.callbacks.Callback):
    """Heats the logits for the epochs of the fault."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def on_epoch_begin(self, epoch, logs=None):
        if self.model is not None:  # On JAX: takes the state out of the run.
            hot = FAULT[0] <= epoch + 1 <= FAULT[1]
            self.layer.heat.assign(HOT if hot else 1.0)


def make() -> keras.Model:
    """Return the model, compiled."""
    x = keras.Input((8, 8))
    y = layers.LayerNormalization()(layers.Dense(WIDTH)(x))
    queries, keys, values = (layers.Dense(WIDTH)(y) for _ in range(3))
    y = y + Attention(name="attention")(queries, keys, values)
    y = layers.Dense(WIDTH, activation="gelu")(layers.LayerNormalization()(y))
    model = keras.Model(x, layers.Dense(10, activation="softmax")(layers.Flatten()(y)))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(kind: str, seed: int, picture: str | None = None) -> dict:
    """Train once; return what there is to say about it.

    Args:
        kind: One of `trainings.RUNS`.
        seed: Int.
        picture: Path of a PNG for `AdaptivePrecision.plot`. Defaults to none.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), test = digits()
    model = make()
    adaptive = mp.AdaptivePrecision()
    callbacks = [Heat(model.get_layer("attention"))]
    policy = "float32" if kind == "float32" else "mixed_float16"
    if policy != "float32":
        mp.convert(model, policy, sample=x[:8, :, :, 0])
    if kind == "adaptive":
        callbacks.append(adaptive)
    start = time.perf_counter()
    fit = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0}
    model.fit(x[..., 0], y, callbacks=callbacks, **fit)
    seconds = time.perf_counter() - start
    found = {
        "benchmark": "passing_fault",
        "task": "hot attention",
        "backend": keras.config.backend(),
        "policy": policy,
        "adaptive": kind == "adaptive",
        "seed": seed,
        "epochs": EPOCHS,
        "fault": FAULT,
        "accuracy": float(model.evaluate(test[0][..., 0], test[1], verbose=0)[1]),
        "seconds": round(seconds, 1),
    }
    if policy != "float32":
        found["skipped"] = int(model.optimizer.overflow_count)
    if kind == "adaptive":
        found["changes"] = [(c.epoch + 1, c.path, c.after) for c in adaptive.changes]
        if picture:
            adaptive.plot(picture)
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", help="the first adaptive run's, a PNG")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    options = parser.parse_args()
    backend = backends.current()
    here = place(backend.device(), backends.versions(backend))
    for kind in options.runs:
        for seed in range(options.seeds):
            row = train(kind, seed, None if seed else options.picture)
            emit(row | here, options.out)


if __name__ == "__main__":
    main()
