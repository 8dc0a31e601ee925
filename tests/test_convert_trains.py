"""Converted models learn real data as well as float32 does (`-m matrix`)."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_mixprec.convert import convert

SEEDS = (0, 1, 2)
EPOCHS, BATCH = 15, 32
HALF_A_POINT = 0.005


def digits():
    """The 1,797 handwritten digits of scikit-learn, half of them to test on."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = (data.images[order, :, :, None] / 16).astype("float32")
    y = data.target[order].astype("int32")
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def convolutional():
    # No Dropout: in float16 it draws other numbers, and another training is compared.
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(10, activation="softmax"),
        ]
    )


def transformer():
    """Each row of pixels is a token."""
    x = keras.Input((8, 8, 1))
    # Of the input, so that the embedding is part of the graph and learns.
    places = ops.cumsum(ops.ones_like(x[:, :, 0, 0], dtype="int32"), axis=1) - 1
    y = layers.Dense(32)(layers.Reshape((8, 8))(x)) + layers.Embedding(8, 32)(places)
    for _ in range(2):
        z = layers.LayerNormalization()(y)
        y = y + layers.MultiHeadAttention(4, 8)(z, z)
        z = layers.Dense(64, activation="gelu")(layers.LayerNormalization()(y))
        y = y + layers.Dense(32)(z)
    y = layers.Flatten()(layers.LayerNormalization()(y))
    return keras.Model(x, layers.Dense(10, activation="softmax")(y))


def accuracy(make, policy, seed) -> float:
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), test = digits()
    model = make()
    if policy != "float32":
        convert(model, policy, sample=x[:8])
        assert any(layer.compute_dtype != "float32" for layer in model.layers)
    # Down to 0: else where a training ends is chance, by more than half a point, and
    # another one on a CPU that rounds otherwise.
    rate = keras.optimizers.schedules.CosineDecay(3e-3, EPOCHS * -(-len(x) // BATCH))
    adam = keras.optimizers.Adam(rate)
    model.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model.evaluate(*test, verbose=0)[1]


@pytest.mark.matrix
@pytest.mark.parametrize("make", [convolutional, transformer])
def test_within_half_a_point_of_float32(make):
    on_jax = keras.config.backend() == "jax"  # Has no float16 attention on CPUs.
    policy = "mixed_bfloat16" if on_jax and make is transformer else "mixed_float16"
    wanted = np.mean([accuracy(make, "float32", seed) for seed in SEEDS])
    got = np.mean([accuracy(make, policy, seed) for seed in SEEDS])
    print(f"{make.__name__}: float32 {wanted:.4f}, {policy} {got:.4f}")
    assert wanted > 0.95
    assert got > wanted - HALF_A_POINT
