"""TensorFlow: the gradient of an `EinsumDense` kernel is one product in half."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

if keras.backend.backend() != "tensorflow":
    pytest.skip("what only TensorFlow does", allow_module_level=True)

import tensorflow as tf  # noqa: E402

import keras_mixprec as mp  # noqa: E402
from keras_mixprec.backend.tensorflow_products import one_product  # noqa: E402

HALF = ("mixed_float16", "mixed_bfloat16")
# Equation, the shape of an output without the axes that come first, of one sample.
EQUATIONS = {
    "abc,cd->abd": ((4, 32), (4, 16)),
    "abc,cde->abde": ((4, 32), (4, 2, 8)),
    "abcd,cde->abe": ((4, 2, 16), (4, 16)),
    "...c,cd->...d": ((4, 32), 16),
}
BATCH = 64


def model_of(equation, policy):
    shape, output_shape = EQUATIONS[equation]
    inputs = keras.Input(shape)
    layer = layers.EinsumDense(equation, output_shape, dtype=policy)
    return keras.Model(inputs, layer(inputs))


def upstream(y_true, y_pred):
    """A loss whose gradient by the outputs is the targets."""
    return ops.sum(y_true * ops.cast(y_pred, "float32"))


def compiled(model, jit_compile=True):
    # A scale that no target grows too large by.
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1.0)
    model.compile(optimizer, upstream, jit_compile=jit_compile)
    return model


def largest_tensor(model):
    """Return the number of values in the largest tensor of a train step."""
    shapes = [(BATCH, *t.shape[1:]) for t in (model.input, model.output)]
    step = tf.function(lambda *data: model.train_step(data))
    graph = step.get_concrete_function(*[tf.zeros(shape) for shape in shapes]).graph
    outputs = [x for operation in graph.get_operations() for x in operation.outputs]
    return max(x.shape.num_elements() or 0 for x in outputs if x.shape.rank is not None)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("policy", [*HALF, "float32"])
def test_no_product_for_each_sample(equation, policy):
    model = compiled(model_of(equation, policy))
    # In float32 it is as Keras has it: once that is one product, ours may go.
    repeats = largest_tensor(model) >= BATCH * 32 * 16
    assert repeats == (policy == "float32")
    assert_as_it_was(model.layers[-1], equation)


def assert_as_it_was(layer, equation):
    assert layer.equation == equation
    assert "call" not in vars(layer)


def test_a_cpu_without_xla_is_left_as_it_is():
    # Where oneDNN does not know half precision, it would add up in it.
    model = compiled(model_of("abc,cd->abd", "mixed_float16"), jit_compile=False)
    on_cpu = not tf.config.list_physical_devices("GPU")
    assert (largest_tensor(model) >= BATCH * 32 * 16) == on_cpu


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(
    "policy, most", [("mixed_float16", 2**11), ("mixed_bfloat16", 2**8)]
)
def test_it_is_rounded_once(equation, policy, most):
    # The first sample's share, most + 1, is no number in half precision.
    model = compiled(model_of(equation, policy))
    x, y = (np.zeros((2, *t.shape[1:]), "float32") for t in (model.input, model.output))
    x[...] = 1
    y[0, 0], y[0, 1], y[1, 0] = most, 1, -most
    kernel = model.layers[-1].kernel
    before = kernel.numpy()
    kernel.assign(np.zeros_like(before))
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(kernel.numpy(), -np.ones_like(before))


class AskedForItsShape(layers.Layer):
    """A layer that asks the one inside for its output's shape, in `call`."""

    def __init__(self, inner):
        super().__init__(dtype=inner.dtype_policy)
        self.inner = inner

    def call(self, x):
        y = self.inner(x)
        assert y.shape[1:] == self.inner.compute_output_shape(x.shape)[1:]
        return y


class Free(layers.EinsumDense):
    """A layer that takes what it is given."""

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = None


class Three(layers.EinsumDense):
    """A layer with an equation of its own for its own call."""

    def build(self, input_shape):
        super().build(input_shape)
        self.equation = "abc,cd,d->abd"

    def call(self, x):
        return ops.einsum("abc,cd->abd", x, self.kernel)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 16)


def of_a_part_that_is_built(dtype):
    part = model_of("abc,cd->abd", dtype)
    # Built when its first step is traced, and asks its parts for shapes.
    return keras.Sequential([layers.Rescaling(0.5), part])


def under_remat(dtype):
    with keras.RematScope(mode="larger_than", output_size_threshold=10**9):
        return keras.Sequential(
            [layers.EinsumDense("abc,cd->abd", (4, 16), dtype=dtype)]
        )


MODELS = {
    "part": of_a_part_that_is_built,
    "remat": under_remat,
    "asked": lambda dtype: keras.Sequential(
        [AskedForItsShape(layers.EinsumDense("abc,cd->abd", (4, 16), dtype=dtype))]
    ),
    "free": lambda dtype: keras.Sequential([Free("...c,cd->...d", 16, dtype=dtype)]),
    "three": lambda dtype: keras.Sequential(
        [Three("abc,cd->abd", (4, 16), dtype=dtype)]
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_trains_with_keras_trains(name):
    model = compiled(MODELS[name]("mixed_float16"))
    x, y = np.ones((8, 4, 32), "float32"), np.ones((8, 4, 16), "float32")
    model.fit(x, y, epochs=2, batch_size=4, verbose=0)
    for layer in model._flatten_layers():
        assert "call" not in vars(layer) and " " not in getattr(layer, "equation", "")


def test_attention_trains_as_it_did_and_its_layers_are_as_they_were():
    def trained(eagerly):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((8, 16))
        outputs = layers.MultiHeadAttention(2, 8)(inputs, inputs)
        model = keras.Model(inputs, layers.Dense(1, dtype="float32")(outputs))
        model.compile("sgd", "mse", run_eagerly=eagerly)
        config = model.get_config()
        x = np.random.default_rng(0).normal(size=(32, 8, 16)).astype("float32")
        model.fit(x, x[:, :, :1], epochs=2, verbose=0)
        assert model.get_config() == config
        return model.get_weights()

    with mp.policy_scope("mixed_float16"):
        once, for_each_sample = trained(False), trained(True)
    for a, b in zip(once, for_each_sample, strict=True):
        np.testing.assert_allclose(a, b, atol=2**-9)


def test_two_replicas_that_are_traced_by_turns():
    model = model_of("abc,cd->abd", "mixed_float16")
    layer = model.layers[-1]
    with tf.Graph().as_default():
        first, second = one_product(model, True), one_product(model, True)
        first.__enter__()
        second.__enter__()
        assert "call" in vars(layer)
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
    assert_as_it_was(layer, "abc,cd->abd")
