"""The textbook's first network, 10-10-5-1 with sigmoids, in mixed precision.

    python examples/first_network.py

Learns whether the ten numbers of a sample add up to more than 0, with binary
cross-entropy. A network this small gains no speed: it shows that it learns the same.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

import keras_mixprec as mp  # mixed precision


def load_data(samples):
    """Return samples of ten numbers, and whether they add up to more than 0."""
    x = np.random.default_rng(0).normal(size=(samples, 10)).astype("float32")
    return x, (x.sum(axis=1) > 0).astype("float32")


def build_model():
    """Return the network. The output computes in float32: a loss needs its digits."""
    return keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(10, activation="sigmoid"),
            layers.Dense(5, activation="sigmoid"),
            layers.Dense(1, activation="sigmoid", dtype="float32"),  # mixed precision
        ]
    )


def main(arguments=None):
    """Train. Returns 0 if more than 95% of unseen samples are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="a million samples")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    mp.set_policy(args.policy)  # mixed precision
    x, y = load_data(1_000_000 if args.full else 4096)
    model = build_model()
    model.compile(
        keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=["accuracy"]
    )
    history = model.fit(
        x,
        y,
        batch_size=4096 if args.full else 64,
        epochs=8,
        validation_split=0.2,
        verbose=2,
        callbacks=[mp.MixedPrecisionMonitor()],  # mixed precision
    )
    return 0 if history.history["val_accuracy"][-1] > 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
