"""Time a training step with and without `OverflowInspector` looking at it.

    KERAS_BACKEND=jax python benchmarks/inspector_overhead.py [--width 768 --blocks 4]

A Transformer encoder in mixed_float16 runs four epochs: two to compile both train
functions, then one plain and one in which every batch is looked at.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ.get("KERAS_BACKEND") == "torch":
    # Imported after TensorFlow in one process, torch may segfault.
    import torch  # noqa: F401

import keras
import numpy as np

import keras_mixprec as mp
from keras_mixprec.callbacks.inspector import OverflowInspector


def encoder(width, blocks, length, attention):
    """Return a Transformer encoder without an embedding."""
    inputs = keras.Input((length, width))
    x = inputs
    for _ in range(blocks):
        if attention:
            y = keras.layers.MultiHeadAttention(width // 64, 64)(x, x)
            x = keras.layers.LayerNormalization()(x + y)
        y = keras.layers.Dense(4 * width, activation="gelu")(x)
        y = keras.layers.Dropout(0.1)(keras.layers.Dense(width)(y))
        x = keras.layers.LayerNormalization()(x + y)
    outputs = keras.layers.Dense(1, dtype="float32")(x)
    return keras.Model(inputs, outputs)


class EpochTimes(keras.callbacks.Callback):
    """Seconds per epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 0:
            self.seconds = []
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    # JAX on a CPU cannot train attention in float16.
    parser.add_argument("--no-attention", action="store_true")
    given = parser.parse_args()
    mp.set_policy("mixed_float16")
    model = encoder(given.width, given.blocks, given.length, not given.no_attention)
    model.compile(mp.LossScaleOptimizer("adam"), "mse")
    samples = given.batch * given.steps
    x = np.random.default_rng(0).normal(size=(samples, given.length, given.width))
    x = x.astype("float32")
    times = EpochTimes()
    # Both functions are compiled in the first two epochs, and timed in the others.
    inspector = OverflowInspector(epochs=[1, 3], batches=range(given.steps))
    model.fit(
        *(x, x[..., :1]),
        batch_size=given.batch,
        epochs=4,
        verbose=0,
        callbacks=[times, inspector],
    )
    plain, looked_at = (1e3 * s / given.steps for s in times.seconds[2:])
    print(
        f"{keras.backend.backend()}: {plain:.2f} ms per step, {looked_at:.2f} ms "
        f"looked at ({looked_at / plain - 1:+.1%}), "
        f"{len(inspector.report.frames)} frames"
    )


if __name__ == "__main__":
    main()
