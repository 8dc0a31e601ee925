"""The table of rules: what it keeps in float32, and what it does not."""

import keras
import pytest
from keras import layers

from keras_mixprec.plan import plan

IMAGE = (8, 8, 3)
KEPT = [
    (layers.Normalization(mean=0.0, variance=1.0), IMAGE),
    (layers.Rescaling(1 / 255), IMAGE),
    (layers.UnitNormalization(), IMAGE),
    (layers.SpectralNormalization(layers.Dense(3)), (4,)),
    (layers.GlobalAveragePooling1D(), (4, 3)),
    (layers.AveragePooling2D(8), IMAGE),
    (layers.UpSampling2D(interpolation="bicubic"), IMAGE),
    (layers.RandomBrightness(0.1), IMAGE),
    (layers.Dense(3, activity_regularizer="l2"), (4,)),
    (layers.Dense(3, activation="squareplus"), (4,)),
    (layers.Activation("sparsemax"), (4,)),
    (layers.LSTM(2), (1000, 2)),
    (layers.Discretization(bin_boundaries=[0.0, 1.0]), (4,)),
]
CONVERTED = [
    (layers.BatchNormalization(), IMAGE),
    (layers.LayerNormalization(), IMAGE),
    (layers.GlobalAveragePooling2D(), IMAGE),
    (layers.AveragePooling2D(2), IMAGE),
    (layers.UpSampling2D(), IMAGE),
    (layers.Softmax(), (4,)),
    (layers.LSTM(2), (10, 2)),
]


def policy_of_first(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten()])
    model.add(layers.Dense(1))
    return plan(model)[layer.name].policy


@pytest.mark.parametrize("layer, shape", KEPT, ids=lambda x: type(x).__name__)
def test_table_keeps(layer, shape):
    assert policy_of_first(layer, shape) == "float32"


@pytest.mark.parametrize("layer, shape", CONVERTED, ids=lambda x: type(x).__name__)
def test_table_does_not_keep(layer, shape):
    assert policy_of_first(layer, shape) == "mixed_float16"


def test_masking_compares_in_float32():
    model = keras.Sequential([keras.Input((4, 3)), layers.Masking(), layers.LSTM(2)])
    assert plan(model)["masking*"].reason == "compares exact values"


def test_unscaled_attention_and_normalized_dot_stay():
    x = keras.Input((4, 8))
    a = layers.Attention(name="unscaled")([x, x])
    b = layers.Attention(use_scale=True, name="scaled")([x, x])
    c = layers.Dot(axes=2, normalize=True, name="cosine")([a, b])
    made = plan(keras.Model(x, layers.Dense(1)(c)))
    kept = [p for p in ("unscaled", "scaled", "cosine") if made[p].policy == "float32"]
    assert kept == ["unscaled", "cosine"]
