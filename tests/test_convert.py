"""`convert` and `to_float32`: in place, with nothing lost."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.plan import plan


class Residual(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units, name="dense")
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build(shape)

    def call(self, x):
        return x + self.norm(self.dense(x))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Residual(8, name="block")
        self.head = layers.Dense(2, activation="softmax", name="head")

    def call(self, x):
        return self.head(self.block(x))


def vectors(rows=16, width=8):
    return np.random.default_rng(0).normal(size=(rows, width)).astype("float32")


def sequential():
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, "relu"), layers.Dense(2, "softmax")]
    )


def functional():
    x = keras.Input((8,))
    y = Residual(8)(layers.Dense(8)(x))
    return keras.Model(x, layers.Dense(2, "softmax")(y + x))


def subclassed():
    model = Subclassed()
    model(vectors())
    return model


def nested():
    shared = keras.Sequential([keras.Input((8,)), layers.Dense(8), Residual(8)])
    x = keras.Input((8,))
    return keras.Model(x, layers.Dense(2, "softmax")(shared(shared(x))))


def recurrent():
    x = keras.Input((8,))
    y = layers.Reshape((4, 2))(x)
    y = layers.Bidirectional(layers.SimpleRNN(3, return_sequences=True))(y)
    y = layers.TimeDistributed(layers.Dense(4))(y)
    return keras.Model(x, layers.Dense(2, "softmax")(layers.Flatten()(y)))


MODELS = [sequential, functional, subclassed, nested, recurrent]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request):
    keras.utils.set_random_seed(0)
    return request.param()


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def policies(model):
    return [layer.dtype_policy.name for layer in model._flatten_layers()]


def error(got, wanted):
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_close_in_half_and_exact_on_the_way_back(model, policy):
    x = vectors()
    wanted, weights = outputs(model, x), model.get_weights()
    assert convert(model, policy) is model
    got = outputs(model, x)
    assert got.dtype == "float32"
    assert 0 < error(got, wanted) < 2e-2
    assert policies(model).count(policy) >= 2
    np.testing.assert_equal(model.get_weights(), weights)
    assert to_float32(model) is model
    assert set(policies(model)) == {"float32"}
    np.testing.assert_array_equal(outputs(model, x), wanted)


def test_twice_is_once(model):
    convert(model)
    first, printed = policies(model), str(plan(model))
    got = outputs(model, vectors())
    convert(model)
    assert policies(model) == first
    assert str(plan(model)) == printed
    np.testing.assert_array_equal(outputs(model, vectors()), got)


def test_float16_then_bfloat16_then_float32(model):
    wanted = outputs(model, vectors())
    convert(model)
    convert(model, "mixed_bfloat16")
    assert "mixed_bfloat16" in policies(model)
    assert "mixed_float16" not in policies(model)
    convert(model, "float32")
    assert set(policies(model)) == {"float32"}
    np.testing.assert_array_equal(outputs(model, vectors()), wanted)


def test_a_converted_submodel_inside_a_new_model():
    inner = convert(keras.Sequential([keras.Input((8,)), layers.Dense(8)]))
    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(2)(inner(layers.Dense(8, name="new")(x))))
    wanted = outputs(model, vectors())
    convert(model)
    assert model.get_layer("new").compute_dtype == "float16"
    assert error(outputs(model, vectors()), wanted) < 2e-2
    to_float32(model)
    assert set(policies(model)) == {"float32"}


@pytest.mark.parametrize(
    "keep", ["block/norm", "*norm", layers.LayerNormalization, "block"]
)
def test_kept_sublayer_fits_its_parents_arithmetic(keep):
    model = subclassed()
    wanted = outputs(model, vectors())
    convert(model, keep_float32=keep)
    assert model.block.norm.compute_dtype == "float32"
    assert model.compute_dtype == "float16"
    assert error(outputs(model, vectors()), wanted) < 2e-2
    to_float32(model)
    np.testing.assert_array_equal(outputs(model, vectors()), wanted)


def test_output_made_by_python_code_is_float32():
    class Raw(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return keras.ops.softmax(self.dense(x))

    model = Raw()
    wanted = outputs(model, vectors())
    convert(model)
    assert model.dense.compute_dtype == "float16"
    got = outputs(model, vectors())
    assert got.dtype == "float32"
    assert np.abs(got.sum(-1) - 1).max() < 1e-6  # A float16 softmax is off by 1e-3.
    assert error(got, wanted) < 2e-2


def test_a_plan_is_carried_out(model):
    made = plan(model)
    made.rows[2].policy = "float32"
    made = type(made).from_json(made.to_json())
    convert(model, plan=made)
    by_path = {row.path: row.policy for row in plan(model, "mixed_float16")}
    assert by_path.keys() == {row.path for row in made}
    assert sorted(policies(model)) == sorted(row.policy for row in made)


def test_another_models_plan_changes_nothing(model):
    other = plan(keras.Sequential([keras.Input((8,)), layers.Dense(1, name="odd")]))
    with pytest.raises(ValueError, match="Expected a plan of this model"):
        convert(model, plan=other)
    assert set(policies(model)) == {"float32"}


@pytest.mark.parametrize(
    "arguments, error_class, message",
    [
        ({"policy": "half"}, ValueError, r"Received: policy='half'"),
        ({"policy": "mixed_float16", "plan": 3}, TypeError, "PrecisionPlan"),
        ({"keep_float32": "nowhere"}, ValueError, "to match a layer"),
    ],
)
def test_bad_input_changes_nothing(model, arguments, error_class, message):
    with pytest.raises(error_class, match=message):
        convert(model, **arguments)
    assert set(policies(model)) == {"float32"}


@pytest.mark.parametrize("function", [convert, to_float32])
def test_not_a_model(function):
    with pytest.raises(TypeError, match=r"Received: model="):
        function(layers.Dense(1))


def test_native_mixed_model_goes_to_float32():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    assert {row.reason for row in plan(model)} == {"input", "already float16"}
    to_float32(model)
    assert set(policies(model)) == {"float32"}


def test_a_model_that_was_never_built():
    model = convert(Subclassed())
    got = model(vectors())
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    assert model.block.dense.compute_dtype == "float16"


def test_a_sample_builds_it():
    model = convert(keras.Sequential([Residual(8), layers.Dense(2)]), sample=vectors())
    assert model.built
    assert [x.compute_dtype for x in model.layers] == ["float16", "float32"]


@pytest.mark.parametrize("name", ["Dense", "EinsumDense", "Embedding"])
def test_quantized_layers_stay_as_they_are(name):
    ids = name == "Embedding"
    make = {
        "Dense": lambda: layers.Dense(8),
        "EinsumDense": lambda: layers.EinsumDense("ab,bc->ac", 8),
        "Embedding": lambda: layers.Embedding(8, 8),
    }
    quantized = make[name]()
    x = keras.Input((8,), dtype="int32" if ids else "float32")
    y = layers.Flatten()(quantized(x))
    model = keras.Model(x, layers.Dense(2)(layers.Dense(8, activation="relu")(y)))
    quantized.quantize("int8")
    sample = np.arange(16).reshape(2, 8) % 8 if ids else vectors()
    wanted, weights = outputs(model, sample), quantized.get_weights()
    convert(model)
    assert quantized.dtype_policy.name == "int8_from_float32"
    assert model.layers[-2].compute_dtype == "float16"
    np.testing.assert_equal(quantized.get_weights(), weights)
    assert error(outputs(model, sample), wanted) < 2e-2
