"""Inputs that have to stay exact until the first layer has read them."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_mixprec.convert import convert
from keras_mixprec.plan import plan

pytestmark = pytest.mark.slow


class Reader(keras.Model):
    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(4000, 8, name="embed")
        self.dense = layers.Dense(8, name="dense")
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.dense(self.embed(x)))


class Scaled(keras.Model):
    def __init__(self):
        super().__init__()
        self.scale = layers.Rescaling(1e-6, name="scale")
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.scale(x))


IDS = np.array([[2909, 3001, 1, 2]])  # float16 makes 2908 and 3000 of the first two.


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def test_float_ids_of_a_subclassed_model():
    model, x = Reader(), IDS.astype("float32")
    wanted = outputs(model, x)
    convert(model)
    made = plan(model)
    assert made["embed"].reason == made.rows[0].reason == "input ids"
    assert made["dense"].policy == "mixed_float16"
    np.testing.assert_allclose(outputs(model, x), wanted, atol=1e-3)


def test_integer_ids_of_a_subclassed_model():
    model = Reader()
    wanted = outputs(model, IDS)
    convert(model, sample=IDS)
    made = plan(model, sample=IDS)
    assert {row.policy for row in made.rows[:3]} == {"mixed_float16"}
    np.testing.assert_allclose(outputs(model, IDS), wanted, atol=1e-3)


def test_float_ids_of_a_graph():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(layers.Embedding(4000, 8)(x)))
    wanted = outputs(model, IDS.astype("float32"))
    got = outputs(convert(model), IDS.astype("float32"))
    np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_raw_numbers_of_a_subclassed_model():
    model, x = Scaled(), np.full((2, 4), 2e6, "float32")
    wanted = outputs(model, x)
    convert(model)
    assert plan(model).rows[0].reason == "its inputs are raw data"
    np.testing.assert_allclose(outputs(model, x), wanted, rtol=1e-2)


def test_the_same_layer_in_another_graph_is_another_matter():
    embed = layers.Embedding(4000, 8, name="embed")
    x = keras.Input((4,), dtype="float32")
    embed(x)
    z = keras.Input((4,), dtype="int32")
    model = keras.Model(z, layers.Dense(2)(embed(z)))
    assert plan(model)["embed"].policy == "mixed_float16"
