"""The dry run finds what rules cannot know, and keeps it in float32."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.plan import plan

pytestmark = pytest.mark.slow


class Log(layers.Layer):
    """1e-8 is 0 in float16."""

    def call(self, x):
        return ops.log(ops.relu(x) + 1e-8)


class Times(layers.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.dense = layers.Dense(4, kernel_initializer="ones", name="dense")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x) * self.factor


class Picky(layers.Layer):
    """Raises unless it computes in float32, as raw code of one backend may."""

    def call(self, x):
        if keras.backend.standardize_dtype(x.dtype) != "float32":
            raise TypeError("expected a float32 tensor")
        return x


class Counter(layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight(shape=(), trainable=False, initializer="zeros")

    def call(self, x):
        self.calls.assign_add(1.0)
        return x


def model_with(*inside):
    first = layers.Dense(4, kernel_initializer="ones", name="first")
    return keras.Sequential([keras.Input((4,)), first, *inside, layers.Dense(2)])


def vectors(scale=1.0):
    return np.random.default_rng(0).uniform(1, 2, (8, 4)).astype("float32") * scale


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def relative_error(model, x, wanted):
    return np.abs(outputs(model, x) - wanted).max() / np.abs(wanted).max()


def test_a_constant_that_vanishes_is_found_on_zeros():
    model = model_with(Log(name="log"))
    wanted = outputs(model, vectors())
    convert(model)
    row = plan(model)["log"]
    assert (row.policy, row.reason) == ("float32", "not finite in the dry run")
    assert plan(model)["first"].policy == "mixed_float16"
    assert relative_error(model, vectors(), wanted) < 2e-2


def test_a_layer_that_raises():
    model = model_with(Picky(name="picky"))
    wanted = outputs(model, vectors())
    convert(model)
    reason = plan(model)["picky"].reason
    assert reason.startswith("raised in the dry run: TypeError")
    assert plan(model).counts()["float32"] == 3  # Input, picky, output.
    assert relative_error(model, vectors(), wanted) < 2e-2


def test_an_overflow_shows_its_size():
    model = model_with(Times(6e4, name="times"))
    x = vectors()
    wanted = outputs(model, x)
    convert(model, sample=x)
    largest = np.abs(
        keras.Model(model.inputs, model.layers[1].output).predict(x, verbose=0)
    )
    made = plan(model)
    assert made["times"].reason == f"overflowed in the dry run: max {largest.max():.1e}"
    assert made["times/dense"].policy == "mixed_float16"
    assert relative_error(model, x, wanted) < 2e-2


def test_inputs_beyond_float16():
    model = model_with()
    x = vectors(1e5)
    wanted = outputs(model, x)
    convert(model, sample=x)
    assert np.isfinite(outputs(model, x)).all()
    assert relative_error(model, x, wanted) < 2e-2


def test_bfloat16_does_not_overflow_where_float16_does():
    model = model_with(Times(6e4, name="times"))
    convert(model, "mixed_bfloat16", sample=vectors())
    assert plan(model, "mixed_bfloat16")["times"].policy == "mixed_bfloat16"


def test_operations_of_a_graph_keep_their_sources():
    x = keras.Input((4,))
    y = layers.Dense(4, "relu", name="source")(x)
    y = ops.log(y + 1e-8)
    model = keras.Model(x, layers.Dense(2)(y))
    wanted = outputs(model, vectors())
    convert(model)
    assert plan(model)["source"].reason == "not finite in the dry run"
    assert np.isfinite(outputs(model, -vectors())).all()
    assert relative_error(model, vectors(), wanted) < 2e-2


def test_subclassed_model():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(4, name="first")
            self.log = Log(name="log")
            self.head = layers.Dense(2, name="head")

        def call(self, x):
            return self.head(self.log(self.first(x)))

    model = Model()
    wanted = outputs(model, vectors())
    convert(model)
    assert plan(model)["log"].policy == "float32"
    assert relative_error(model, vectors(), wanted) < 2e-2


def test_remembered_until_to_float32():
    model = model_with(Times(6e4, name="times"))
    convert(model, sample=vectors())
    convert(model)
    assert plan(model)["times"].reason.startswith("overflowed")
    to_float32(model)
    assert plan(model)["times"].policy == "mixed_float16"


def test_plan_with_a_sample_changes_nothing():
    model = model_with(Times(6e4, name="times"), Counter(name="counter"))
    made = plan(model, sample=vectors())
    assert made["times"].reason.startswith("overflowed")
    assert {x.dtype_policy.name for x in model._flatten_layers()} == {"float32"}
    assert float(model.get_layer("counter").calls.value) == 0.0


def test_without_a_dry_run_nothing_is_called():
    model = model_with(Counter(name="counter"), Log(name="log"))
    calls = []
    model.get_layer("log").call = lambda x: calls.append(x) or x
    convert(model, dry_run=False)
    assert not calls
    assert plan(model)["log"].policy == "mixed_float16"


def test_statistics_and_seeds_stay():
    model = model_with(layers.BatchNormalization(), layers.Dropout(0.5))
    before = [np.array(v.value) for v in model.non_trainable_variables]
    convert(model, sample=vectors())
    after = [np.array(v.value) for v in model.non_trainable_variables]
    np.testing.assert_equal(after, before)


def test_a_model_that_fails_in_float32_too_says_so():
    class Broken(layers.Layer):
        def call(self, x):
            if not isinstance(x, keras.KerasTensor) and x.shape[0] == 1:
                raise ValueError("more than one, please")
            return x

    model = model_with(Broken())
    convert(model)  # Zeros of one example cannot be tried; nothing else is wrong.
    assert plan(model)["first"].policy == "mixed_float16"
    assert plan(model, sample=vectors()).advice == []
    made = plan(model, sample=vectors()[:1])
    assert made.advice[0].startswith("no dry run: ValueError")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_sound_models_lose_nothing(policy):
    model = model_with(layers.LayerNormalization(), layers.Activation("gelu"))
    assert (
        plan(model, policy, sample=vectors()).counts() == plan(model, policy).counts()
    )
