"""`convert(..., activations="float32")`: only the function sees float32."""

import contextlib
import io
import pathlib
import re

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_mixprec as mp
from keras_mixprec.present import present_plan

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def steep(x):
    """exp(x) - exp(x - 1/8): in float16 the two round apart; it notes what it got."""
    steep.seen = keras.backend.standardize_dtype(x.dtype)
    return (ops.exp(x) - ops.exp(x - 0.125)) / 10


def make(activation=steep):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation=activation, name="first"),
            layers.Activation(activation, name="second"),
            layers.Dense(2),
        ]
    )


def data():
    return np.random.default_rng(0).normal(size=(32, 8)).astype("float32")


def half_output(model):
    hidden = keras.Model(model.inputs, model.get_layer("first").output)
    return hidden([data()])


def test_the_function_computes_in_float32_between_half_and_half():
    model, x = make(), data()
    mp.convert(model)
    assert steep.seen == "float16"
    without = mp.compare_precision(model, x)
    mp.convert(model, activations="float32")
    assert keras.backend.standardize_dtype(half_output(model).dtype) == "float16"
    assert steep.seen == "float32"
    # By hand: product and bias in half, function in float32, result in half.
    kernel, bias = model.get_layer("first").get_weights()
    z = ops.matmul(ops.cast(x, "float16"), ops.cast(kernel, "float16"))
    z = ops.cast(z + ops.cast(bias, "float16"), "float32")
    expected = ops.cast(steep(z), "float16")
    found = ops.convert_to_numpy(half_output(model))
    np.testing.assert_allclose(found, ops.convert_to_numpy(expected), rtol=2e-3)
    within = mp.compare_precision(model, x)
    assert within["first"].own_error < without["first"].own_error
    assert within["second"].own_error < without["second"].own_error


def test_kept_by_converting_again_undone_on_request():
    model = make("gelu")
    first = model.get_layer("first")
    mp.convert(model, activations="float32")
    mp.convert(model)
    assert first._mixprec_activation == "float32"
    mp.convert(model, activations="half")
    assert first.activation is keras.activations.gelu
    mp.convert(model, activations="float32")
    mp.to_float32(model)
    assert first.activation is keras.activations.gelu
    assert not hasattr(first, "_mixprec_activation")


def test_survives_saving(tmp_path):
    model, x = make("gelu"), data()
    mp.convert(model, activations="float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("first")._mixprec_activation == "float32"
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


def test_a_plan_holds_it():
    model = make("gelu")
    plan = mp.plan(model)
    plan.activations = "float32"
    plan = mp.PrecisionPlan.from_json(plan.to_json())
    assert "activation functions in float32" in str(plan)
    mp.convert(model, plan=plan)
    assert model.get_layer("first")._mixprec_activation == "float32"
    assert present_plan(model).activations == "float32"


def test_layers_in_float32_cells_and_layer_activations_stay():
    model = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.LSTM(4, name="lstm"),
            layers.Dense(4, activation=layers.LeakyReLU(), name="leaky"),
            layers.Dense(2, "softmax", name="output"),
        ]
    )
    mp.convert(model, activations="float32")
    for name in ("lstm", "leaky", "output"):
        assert not hasattr(model.get_layer(name), "_mixprec_activation")
    assert not hasattr(model.get_layer("lstm").cell, "_mixprec_activation")


def test_trains():
    model, x = make("gelu"), data()
    model.compile("adam", "mse")
    mp.convert(model, activations="float32")
    model.fit(x, np.ones((32, 2), "float32"), epochs=2, verbose=0)
    assert model.optimizer.overflow_count == 0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads JAX's programs")
def test_xla_fuses_the_casts_with_the_function(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import activations

    half, full = (
        activations.forward(*activations.build("mixed_float16", kind))[1]
        for kind in activations.KINDS
    )
    products = r"= f16\[.*multiply\("  # Those of gelu: the kernels' are no such ones.
    assert re.search(products, half)
    assert not re.search(products, full)
    assert activations.operations(full) == activations.operations(half)
    depth = activations.SIZES["small"][1]
    assert sum(activations.operations(half).values()) > depth


def kept_for_backward(model, x):
    """Lines of JAX's own list of what the forward pass keeps: `f16[32,16] ...`."""
    import jax.ad_checkpoint

    values = [v.value for v in model.trainable_variables]

    def loss(values):
        mapping = list(zip(model.trainable_variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return ops.sum(model(x, training=True))

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax.ad_checkpoint.print_saved_residuals(loss, values)
    lines = printed.getvalue().splitlines()
    return [line for line in lines if "from the argument" not in line]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="asks JAX what it keeps")
def test_nothing_is_kept_in_float32_for_the_backward_pass():
    model = make("gelu")
    mp.convert(model)
    half = kept_for_backward(model, data())
    mp.convert(model, activations="float32")
    full = kept_for_backward(model, data())
    assert half and len(full) < len(half), (half, full)
    # But what goes into the last layer, which is float32 either way.
    float32 = [[x for x in lines if x.startswith("f32")] for lines in (half, full)]
    assert float32[0] == float32[1] and len(float32[0]) == 1, float32


class Slope(layers.Dense):
    """Its activation function has a weight."""

    def build(self, shape):
        super().build(shape)
        self.slope = self.add_weight(shape=(), initializer="ones", autocast=False)
        self.activation = self.function

    def function(self, x):
        return ops.gelu(x * ops.cast(self.slope, x.dtype))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="its XLA")
def test_gradients_are_those_of_the_function_compiled_or_not():
    losses = []
    for jit_compile in (True, False):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8,))
        x = make("gelu")(Slope(8, name="slope")(inputs))
        model = keras.Model(inputs, x)
        mp.convert(model, activations="float32")
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)
        y = np.ones((32, 2), "float32")
        history = model.fit(data(), y, epochs=5, verbose=0, shuffle=False).history
        losses.append(history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_arguments():
    with pytest.raises(ValueError, match="Received: activations='float64'"):
        mp.convert(make("relu"), activations="float64")
