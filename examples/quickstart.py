"""Train a small CNN on real images in float32 and in mixed_float16, side by side.

    python examples/quickstart.py
    KERAS_BACKEND=jax python examples/quickstart.py

The data are the 1,797 handwritten digits that scikit-learn ships. Prints a table and
writes curves, as pictures and as one HTML page, into `quickstart-output`.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# On a model this small torch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
from keras import layers
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_mixprec as mp

BATCH_SIZE = 64
MEMORY = {"gpu_memory_peak_mb": "GPU MiB", "host_memory_mb": "host MiB"}


def load_data():
    """Return train and test images of 8x8 pixels in [0, 1], and their digits."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    return train_test_split(
        images, digits, test_size=0.3, stratify=digits, random_state=0
    )


def build_model():
    """Return a CNN whose layers follow the global policy, but for its outputs."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *convolution(32),
            *convolution(32),
            layers.MaxPooling2D(),
            *convolution(64),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax", dtype="float32"),
        ]
    )


def convolution(filters):
    """Return a convolution with BatchNormalization, whose statistics move fast."""
    return [
        layers.Conv2D(filters, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.Activation("relu"),
    ]


def optimizer(policy, steps):
    """Return Adam; in float16 with a loss scale that moves within so short a run.

    `compile("adam")` would do: it gets the defaults, which start at 2**15 and grow
    every 2,000 steps.
    """
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps))
    if policy == "float32":
        return adam
    return mp.LossScaleOptimizer(adam, initial_scale=2.0**20, dynamic_growth_steps=50)


def train(policy, data, epochs, seed):
    """Train under `policy`. Returns the history, and the seconds it took."""
    x, x_test, y, y_test = data
    print(f"\n{policy}", flush=True)
    with mp.policy_scope(policy):
        keras.utils.set_random_seed(seed)
        model = build_model()
        model.compile(
            optimizer(policy, epochs * -(-len(x) // BATCH_SIZE)),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        start = time.perf_counter()
        history = model.fit(
            x,
            y,
            BATCH_SIZE,
            epochs,
            validation_data=(x_test, y_test),
            callbacks=[mp.MixedPrecisionMonitor()],
            verbose=2,
        )
    return history, time.perf_counter() - start


def print_table(runs):
    """Print one row for each policy."""
    memory = next(k for k in MEMORY if k in runs["float32"][0].history)
    table = Table(title="1,797 digits of scikit-learn, 30% of them for the test")
    table.add_column("policy")
    for name in ("accuracy", "loss scale", "overflows", "seconds", MEMORY[memory]):
        table.add_column(name, justify="right")
    for policy, (history, seconds) in runs.items():
        last = {key: values[-1] for key, values in history.history.items()}
        table.add_row(
            policy,
            f"{last['val_accuracy']:.2%}",
            f"{last['loss_scale']:,.0f}" if "loss_scale" in last else "-",
            f"{last['overflow_total']}" if "overflow_total" in last else "-",
            f"{seconds:.1f}",
            f"{last[memory]:,.0f}",
        )
    Console(width=80).print(table)


def holds(runs):
    """Return whether both accuracies are above 95% and within one point."""
    accuracies = [h.history["val_accuracy"][-1] for h, _ in runs.values()]
    return min(accuracies) > 0.95 and max(accuracies) - min(accuracies) <= 0.01


def main(arguments=None):
    """Run the comparison. Returns 0 if the accuracies hold, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quickstart-output")
    args = parser.parse_args(arguments)
    data = load_data()
    runs = {
        policy: train(policy, data, args.epochs, args.seed)
        for policy in ("float32", "mixed_float16")
    }
    print_table(runs)
    page = mp.report(
        {policy: history for policy, (history, _) in runs.items()},
        args.output,
        title="Digits: float32 and mixed_float16 side by side",
    )
    print(f"Curves: {page.parent / 'curves.png'} and {page}")
    if holds(runs):
        return 0
    print("The accuracies are not within one point of each other and above 95%.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
