"""What the loops share: the digits of scikit-learn in batches, and a small network."""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load_data():
    """Return train and test images of 64 numbers in [0, 1], and their digits."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        (images / 16).astype("float32"), labels, test_size=0.3, random_state=0
    )


def batches(x, y, size, epochs):
    """Yield shuffled batches of equal size."""
    random = np.random.default_rng(0)
    for _ in range(epochs):
        order = random.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            chosen = order[start : start + size]
            yield x[chosen], y[chosen]


def build_model(width):
    """Return a classifier that follows the global policy, but for its outputs."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(width, activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dense(width, activation="relu"),
            layers.Dense(10, dtype="float32"),
        ]
    )


def accuracy(model, x, y):
    """Return the share of images whose digit is right."""
    return float((model.predict(x, verbose=0).argmax(axis=1) == y).mean())
