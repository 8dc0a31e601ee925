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
from keras_mixprec.backend import engine
from keras_mixprec.present import present_plan

BACKEND = keras.backend.backend()
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


@pytest.mark.skipif(BACKEND != "jax", reason="reads JAX's programs")
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


@pytest.mark.skipif(BACKEND == "torch", reason="XLA compiles on the others")
@pytest.mark.slow
def test_the_benchmark_times_the_steps_of_a_transformer(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import activations

    words = "--what bert --size small --policy mixed_bfloat16 --blocks 2 --steps 1"
    options = activations.parse(words.split())
    backend, policy = activations.current(), "mixed_bfloat16"
    before = keras.config.dtype_policy()
    runners = activations.compiled(backend, activations.Bert, policy, options.size)
    keras.config.set_dtype_policy(before)
    in_float32 = {
        kind: any(
            hasattr(layer, "_mixprec_activation")
            for layer in runner.model._flatten_layers()
        )
        for kind, runner in runners.items()
    }
    assert in_float32 == {"half": False, "float32": True}
    row = activations.measure(backend, runners, policy, options)
    assert row["what"] == "train step, BERT-base" and row["batch"] == 4
    assert row["ms_half"] > 0 and row["ms_float32"] > 0


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


@pytest.mark.skipif(BACKEND != "jax", reason="asks JAX what it keeps")
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
    """Its activation function takes a second tensor."""

    def build(self, shape):
        super().build(shape)
        self.slope = self.add_weight(shape=(), initializer="ones", autocast=False)

    def call(self, x):
        return self.activation(super().call(x), self.slope)


class Noise(layers.Dense):
    """Its activation function draws numbers."""

    def build(self, shape):
        super().build(shape)
        self.seeds, self.activation = keras.random.SeedGenerator(7), self.noisy

    def noisy(self, x):
        # Not in the dtype of `x`, in which the numbers would be others.
        noise = keras.random.normal(ops.shape(x), dtype="float32", seed=self.seeds)
        return x * ops.cast(1 + noise, x.dtype)


def scaled(x, slope=1.0):
    return ops.tanh(x * ops.cast(slope, x.dtype))


def trained(layer, jit_compile, activations):
    """Return the losses of five steps, and what the layer's variables are after."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), layer(), *make("gelu").layers])
    mp.convert(model, activations=activations)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), 256.0)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    y = np.ones((32, 2), "float32")
    history = model.fit(data(), y, epochs=5, verbose=0, shuffle=False).history
    return history["loss"], [ops.convert_to_numpy(v) for v in model.layers[0].variables]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dense(8, activation="gelu"),
        lambda: Slope(8, activation=scaled),
        lambda: Noise(8),
    ],
    ids=["gelu", "slope", "noise"],
)
def test_gradients_are_those_of_the_function_in_half(layer, monkeypatch):
    # On TensorFlow what is done where XLA is known to compile, and only there.
    name = "_recomputed" if BACKEND == "tensorflow" else "recomputed"
    anew, real = [], getattr(engine, name)
    monkeypatch.setattr(engine, name, lambda function: anew.append(1) or real(function))
    losses, variables = trained(layer, BACKEND != "torch", "float32")
    # That of the hidden layer too.
    assert len(anew) >= 2
    in_half, expected = trained(layer, BACKEND != "torch", "half")
    np.testing.assert_allclose(losses, in_half, rtol=0.02)
    assert losses[-1] < 0.9 * losses[0]
    for found, wanted in zip(variables, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0.02, atol=5e-3)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its tapes and its XLA")
def test_a_gradient_of_a_gradient_passes_what_is_computed_anew():
    import tensorflow as tf

    from keras_mixprec.backend.tensorflow import _recomputed

    def second(function):
        def call(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = function(x)
                first = inner.gradient(y, x)
            return first, outer.gradient(first, x)

        return tf.function(call, jit_compile=True)(tf.constant([0.5, -1.0, 2.0]))

    for found, expected in zip(
        second(_recomputed(tf.math.tanh)), second(tf.math.tanh), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_arguments():
    with pytest.raises(ValueError, match="Received: activations='float64'"):
        mp.convert(make("relu"), activations="float64")


@pytest.mark.skipif(
    BACKEND != "jax", reason="of JAX's gelu alone there is a cheaper one"
)
def test_the_cheaper_gradient_of_gelu_is_the_same():
    import jax

    x = np.linspace(-12, 12, 4097).astype("float32")
    cheaper = engine.activation(keras.activations.gelu)
    assert engine.activation(keras.activations.relu) is keras.activations.relu
    forward = [jax.jit(f)(x) for f in (cheaper, keras.activations.gelu)]
    np.testing.assert_array_equal(*forward)
    found, expected = (
        jax.vmap(jax.grad(f))(x) for f in (cheaper, keras.activations.gelu)
    )
    # Three units in the last place of 1.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=3e-7)
    # Forwards and twice, as of any function.
    ones = np.ones_like(x)
    np.testing.assert_allclose(jax.jvp(cheaper, (x,), (ones,))[1], found)
    second = jax.vmap(jax.grad(jax.grad(cheaper)))(x)
    wanted = jax.vmap(jax.grad(jax.grad(keras.activations.gelu)))(x)
    np.testing.assert_allclose(second, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="asks JAX what it computes")
def test_what_the_gradient_of_gelu_does_not_need_is_not_computed_anew():
    import jax

    model = make("gelu")
    mp.convert(model, activations="float32")
    activation = model.get_layer("first").activation
    program = jax.make_jaxpr(jax.grad(lambda x: ops.sum(activation(x))))
    program = str(program(np.ones(4, "float16")))
    # In the forward pass alone.
    assert program.count("= erfc ") == 1 and program.count("= erf ") == 1


def test_an_activation_function_still_builds_graphs():
    model = make("gelu")
    mp.convert(model, activations="float32")
    symbolic = keras.Input((4,), dtype="float16")
    assert model.get_layer("first").activation(symbolic).shape == (None, 4)
