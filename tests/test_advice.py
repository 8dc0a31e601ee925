"""Advice, and the numbers at the foot of a plan."""

import keras
import pytest
from keras import layers

from keras_mixprec.costs import multiply_adds
from keras_mixprec.costs import own_parameters
from keras_mixprec.plan import plan

OF_HEAD = "holds 50% of all multiply-adds in float32"


def planned(*inside, shape=(8,), dtype="float32"):
    head = layers.Dense(8, name="head")
    return plan(keras.Sequential([keras.Input(shape, dtype=dtype), *inside, head]))


def test_sizes_that_tensor_cores_do_not_like():
    made = planned(layers.Dense(12, name="odd"), layers.Dense(16, name="next"))
    wanted = "dimension 12 of its kernel is not a multiple of 8"
    assert made["odd"].advice == made["next"].advice == [wanted]
    assert planned(layers.Dense(12))["head"].advice == [OF_HEAD]  # Not its 12.


def test_constants_that_float16_does_not_have():
    class Shifted(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.epsilon, self.infinity, self.fine = 1e-9, 1e9, 0.5

        def call(self, x):
            return x

    made = planned(Shifted(name="shifted"), layers.BatchNormalization(epsilon=1e-9))
    assert made["shifted"].advice == [
        "epsilon=1e-09 is 0 in float16",
        "infinity=1e+09 is inf in float16",
    ]
    assert made["batch_normalization*"].advice == []  # Computes in float32 inside.


def test_what_dominates_the_float32_share():
    made = planned(layers.Dense(8, name="small"), layers.Dense(64, name="large"))
    assert made["head"].advice == ["holds 47% of all multiply-adds in float32"]
    assert planned(layers.Dense(64), layers.Dense(8))["head"].advice == []


def test_ids_as_floats_and_float64():
    embed = layers.Embedding(10, 8, name="embed")
    made = planned(embed, layers.Flatten(), shape=(4,))
    assert made["embed"].advice == ["ids arrive as floats: pass integers instead"]
    assert (
        planned(embed, layers.Flatten(), shape=(4,), dtype="int32")["embed"].advice
        == []
    )


def test_advice_is_printed():
    printed = str(planned(layers.Dense(12, name="odd")))
    assert "advice: odd: dimension 12 of its kernel" in printed


def test_shares_at_the_foot():
    made = planned(layers.Dense(24, use_bias=False))
    assert made.half_share("parameters") == pytest.approx(192 / (192 + 200))
    assert made.half_share("multiply_adds") == 0.5
    assert "49.0% of parameters, 50.0% of multiply-adds" in str(made)


SIZES = [
    (layers.Dense(5), (3, 4), 3 * 4 * 5, 4 * 5 + 5),
    (layers.Conv2D(6, 3, padding="same"), (8, 8, 2), 64 * 9 * 2 * 6, 9 * 2 * 6 + 6),
    (layers.DepthwiseConv2D(3, padding="same"), (8, 8, 2), 64 * 9 * 2, 9 * 2 + 2),
    (layers.Conv1D(6, 3, groups=2), (8, 4), 6 * 3 * 2 * 6, 3 * 2 * 6 + 6),
    (layers.EinsumDense("abc,cde->abde", (3, 4, 5)), (3, 2), 3 * 2 * 20, 40),
    (layers.Embedding(10, 4), (3,), 0, 40),
    (layers.BatchNormalization(), (3,), 0, 12),
]


@pytest.mark.parametrize("layer, shape, adds, weights", SIZES)
def test_costs(layer, shape, adds, weights):
    layer.build((None, *shape))
    assert (multiply_adds(layer), own_parameters(layer)) == (adds, weights)
