"""What a model hard-codes to float32 stays so, and nothing else does."""

import random

import keras
import numpy as np
import pytest
from keras import layers

from keras_mixprec.convert import convert
from keras_mixprec.plan import plan

pytestmark = pytest.mark.slow


@keras.saving.register_keras_serializable(package="test_template")
class Gate(layers.Layer):
    """Its softmax is float32 on purpose; its Dense only follows the default."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units, name="dense")
        self.softmax = layers.Softmax(dtype="float32", name="softmax")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        scores = self.softmax(self.dense(x))
        assert keras.backend.standardize_dtype(scores.dtype) == "float32"
        return x * keras.ops.cast(scores, x.dtype)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class NoConfig(Gate):
    def get_config(self):
        raise NotImplementedError


def gated(gate):
    x = keras.Input((8,))
    y = layers.Dense(8, name="before")(x)
    return keras.Model(x, layers.Dense(2)(gate(y)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_found_from_the_config(policy):
    made = plan(gated(Gate(8, name="gate")), policy)
    row = made["gate/softmax"]
    assert (row.policy, row.reason) == ("float32", "hard-coded by its model")
    assert made["gate"].policy == made["gate/dense"].policy == policy


def test_its_outputs_are_left_to_its_author():
    model = gated(Gate(8, name="gate"))
    x = np.ones((2, 8), "float32")
    wanted = keras.ops.convert_to_numpy(model(x))
    convert(model, dry_run=False)
    got = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(got, wanted, atol=1e-2)


def test_without_a_config_nothing_is_known():
    made = plan(gated(NoConfig(8, name="gate")))
    assert made["gate/softmax"].policy == "mixed_float16"


def test_a_subclassed_model_with_its_own_config():
    @keras.saving.register_keras_serializable(package="test_template")
    class Model(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.exact = layers.Dense(8, dtype="float32", name="exact")
            self.plain = layers.Dense(8, name="plain")
            self.head = layers.Dense(2, name="head")

        def call(self, x):
            return self.head(self.plain(self.exact(x)))

    model = Model()
    model(np.ones((2, 8), "float32"))
    made = plan(model)
    assert made["exact"].reason == "hard-coded by its model"
    assert made["plain"].policy == "mixed_float16"


def test_planning_leaves_no_trace():
    model = gated(Gate(8, name="gate"))
    name = layers.Dense(1).name
    state = random.getstate()
    plan(model)
    assert random.getstate() == state
    assert keras.config.dtype_policy().name == "float32"
    number = int(name.rpartition("_")[2]) if "_" in name else 0
    assert layers.Dense(1).name == f"dense_{number + 1}"
