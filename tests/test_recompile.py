"""Compiled models are compiled anew: same state, other precisions."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_mixprec as mp
from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32


def vectors(rows=16):
    return np.random.default_rng(0).normal(size=(rows, 8)).astype("float32")


def functional():
    x = keras.Input((8,))
    y = layers.Dense(8, "relu")(x)
    return keras.Model(x, layers.Dense(2, "softmax")(y))


def compiled():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, "relu"), layers.Dense(2, "softmax")]
    )
    model.compile(
        keras.optimizers.Adam(0.1),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        loss_weights=0.5,
    )
    return model


def labels(x):
    return (x[:, 0] > 0).astype("int32")


def test_compiled_model_keeps_optimizer_metrics_and_loss_weights():
    model, x = compiled(), vectors(64)
    model.fit(x, labels(x), epochs=2, verbose=0)
    before = model.evaluate(x, labels(x), verbose=0)
    adam, slots = model.optimizer, [v.numpy() for v in model.optimizer.variables]
    convert(model)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer is adam
    for variable, slot in zip(adam.variables, slots, strict=True):
        np.testing.assert_array_equal(variable.numpy(), slot)
    np.testing.assert_allclose(model.evaluate(x, labels(x), verbose=0), before, 1e-2)
    model.fit(x, labels(x), epochs=2, verbose=0)
    assert int(adam.iterations) == 8
    to_float32(model)
    assert model.optimizer is adam
    model.fit(x, labels(x), verbose=0)
    assert int(adam.iterations) == 10


def test_bfloat16_needs_no_loss_scale():
    model, x = compiled(), vectors(64)
    adam = model.optimizer
    convert(model, "mixed_bfloat16")
    assert model.optimizer is adam
    model.fit(x, labels(x), verbose=0)


def test_an_optimizer_that_scales_already_stays():
    model = compiled()
    model.compile(mp.LossScaleOptimizer("sgd", initial_scale=8.0), "mse")
    optimizer = model.optimizer
    convert(model)
    assert model.optimizer is optimizer
    to_float32(model)
    assert model.optimizer is optimizer


def test_cached_functions_run_the_new_precision():
    model, x = compiled(), vectors()
    before = model.predict(x, verbose=0)
    model.train_on_batch(x, labels(x))
    convert(model)
    assert not np.array_equal(model.predict(x, verbose=0), before)


def test_compile_after_converting_scales_the_loss():
    model = convert(functional())
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    x = vectors()
    model.fit(x, labels(x), verbose=0)
    assert model.optimizer.overflow_count == 0


def test_a_compile_of_the_users_own():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

        def compile(self, d_optimizer):
            super().compile(loss="mse", optimizer="sgd")
            self.d_optimizer = d_optimizer

    model = Gan()
    model(vectors())
    model.compile(d_optimizer=keras.optimizers.Adam())
    sgd, adam = model.optimizer, model.d_optimizer
    convert(model, keep_float32=())
    assert model.d_optimizer is adam
    assert model.train_function is None
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert inner is sgd


def test_a_gan_that_was_compiled_before_is_told_what_to_scale():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)
            self.head = layers.Dense(1, dtype="float32")

        def call(self, x):
            return self.head(self.dense(x))

        def compile(self, d_optimizer, g_optimizer):
            super().compile(optimizer=None, loss="mse")
            self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

        def train_step(self, *args):
            raise NotImplementedError

    model = Gan()
    model(vectors())
    model.compile(keras.optimizers.Adam(), mp.LossScaleOptimizer("adam"))
    convert(model)
    line = r"`model.d_optimizer = mp.LossScaleOptimizer\(model.d_optimizer\)`, and in"
    with (
        pytest.warns(UserWarning, match=line),
        pytest.raises((NotImplementedError, AttributeError)),
    ):
        model.fit(vectors(), vectors()[:, :1], verbose=0)


def test_models_inside_are_compiled_anew_too():
    inner = functional()
    inner.compile("sgd", "mse")
    x = keras.Input((8,))
    outer = keras.Model(x, layers.Dense(1)(inner(x)))
    inner.train_on_batch(vectors(), vectors()[:, :2])
    convert(outer)
    assert isinstance(inner.optimizer, mp.LossScaleOptimizer)
    inner.train_on_batch(vectors(), vectors()[:, :2])
    to_float32(outer)
    assert isinstance(inner.optimizer, keras.optimizers.SGD)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_an_uncompiled_model_stays_uncompiled(policy):
    assert not convert(functional(), policy).compiled


def test_converted_before_a_step_the_optimizers_state_is_saved(tmp_path):
    x = np.ones((8, 8), "float32")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    slots = [np.array(v) for v in model.optimizer.variables]
    mp.convert(model).save(tmp_path / "half.keras")
    half = keras.saving.load_model(tmp_path / "half.keras")
    for before, after in zip(
        slots, half.optimizer.inner_optimizer.variables, strict=True
    ):
        assert before.tobytes() == np.array(after).tobytes()
