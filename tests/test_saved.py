"""A converted model that is saved and loaded computes in the same precisions."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_mixprec as mp
from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.plan import plan


@keras.saving.register_keras_serializable(package="test_saved")
class Block(layers.Layer):
    """Makes its sublayers without passing its policy on, so Keras loses them."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units, "relu")
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.units))

    def call(self, x):
        return x + self.norm(self.dense(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="test_saved")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(8, name="block")
        self.head = layers.Dense(2, activation="softmax", name="head")

    def call(self, x):
        return self.head(self.block(x))


def vectors(rows=16):
    return np.random.default_rng(0).normal(size=(rows, 8)).astype("float32")


def sequential():
    return keras.Sequential([keras.Input((8,)), Block(8), layers.Dense(2, "softmax")])


def functional():
    x = keras.Input((8,))
    inner = keras.Sequential([keras.Input((8,)), Block(8), layers.Dense(8)])
    y = layers.Reshape((2, 4))(inner(inner(x)))
    y = layers.MultiHeadAttention(2, 2)(y, y)
    y = layers.Bidirectional(layers.SimpleRNN(3))(y)
    return keras.Model(x, layers.Dense(2, "softmax")(y))


def subclassed():
    model = Subclassed()
    model(vectors())
    return model


@pytest.fixture(params=[sequential, functional, subclassed], ids=lambda f: f.__name__)
def model(request):
    keras.utils.set_random_seed(0)
    return request.param()


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def policies(model):
    return [layer.dtype_policy.name for layer in model._flatten_layers()]


def reload(model, path):
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


def test_same_precisions_and_outputs(model, tmp_path):
    wanted = outputs(model, vectors())
    convert(model, keep_float32="*norm*")
    loaded = reload(model, tmp_path)
    assert policies(loaded) == policies(model)
    assert "mixed_float16" in policies(loaded)
    got = outputs(model, vectors())
    np.testing.assert_array_equal(outputs(loaded, vectors()), got)
    to_float32(loaded)
    np.testing.assert_array_equal(outputs(loaded, vectors()), wanted)


def test_what_the_user_kept_is_remembered(tmp_path):
    loaded = reload(convert(sequential(), keep_float32=Block), tmp_path)
    reasons = [r.reason for r in plan(loaded) if r.layer_class == "Block"]
    assert reasons == ["user"]


def test_class_and_config_look_as_before(model):
    before, config = type(model), model.get_config()
    convert(model)
    assert isinstance(model, before)
    assert type(model).__name__ == before.__name__
    assert config.keys() <= model.get_config().keys()
    to_float32(model)
    assert type(model) is before


def test_clone_keeps_the_precisions(model):
    convert(model)
    clone = type(model).from_config(model.get_config())
    clone.build((None, 8))
    clone.set_weights(model.get_weights())
    assert policies(clone)[0] == policies(model)[0] == "mixed_float16"


def test_saved_inside_another_model(tmp_path):
    inner = convert(sequential())
    x = keras.Input((8,))
    outer = keras.Model(x, layers.Dense(2)(inner(x)))
    loaded = reload(outer, tmp_path)
    assert policies(loaded) == policies(outer)
    assert policies(loaded).count("mixed_float16") == 4


def test_compiled_model_trains_on_where_it_was(tmp_path):
    model, x = sequential(), vectors(64)
    y = (x[:, 0] > 0).astype("int32")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    convert(model)
    model.fit(x, y, verbose=0)
    loaded = reload(model, tmp_path)
    assert isinstance(loaded.optimizer, mp.LossScaleOptimizer)
    assert int(loaded.optimizer.inner_optimizer.iterations) == 2
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    loaded.fit(x, y, verbose=0)
    to_float32(loaded)
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert int(loaded.optimizer.iterations) == 4


def test_compiled_after_converting(tmp_path):
    model, x = convert(sequential()), vectors(64)
    y = (x[:, 0] > 0).astype("int32")
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    loaded = reload(model, tmp_path)
    assert isinstance(loaded.optimizer, mp.LossScaleOptimizer)
    assert int(loaded.optimizer.inner_optimizer.iterations) == 2


def test_file_without_precisions_after_to_float32(tmp_path):
    model = to_float32(convert(sequential()))
    assert "keras_mixprec" not in str(keras.saving.serialize_keras_object(model))
    assert set(policies(reload(model, tmp_path))) == {"float32"}


def test_a_model_that_changed_since_it_was_saved_warns(tmp_path):
    model = convert(sequential())
    config = model.get_config()
    config["keras_mixprec"]["layers"].pop()
    with pytest.warns(UserWarning, match=r"Call `keras_mixprec.convert\(model\)`"):
        type(model).from_config(config)
