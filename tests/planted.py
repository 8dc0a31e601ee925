"""Models with one fault that float16 does not survive, and one without any."""

import keras
import numpy as np
from keras import layers
from keras import ops


class Squares(layers.Layer):
    """Divides by the root mean square: sound, but its squares pass 65504."""

    def call(self, x):
        mean = ops.mean(ops.square(x), axis=-1, keepdims=True)
        return x / ops.sqrt(mean + 1.0)


class TinyEpsilon(layers.Layer):
    """log(relu(x) + 1e-8), which float16 reads as log(relu(x) + 0)."""

    def call(self, x):
        return ops.log(ops.relu(x) + 1e-8) / 10


class TinyEpsilonBackward(layers.Layer):
    """sqrt(x**2 + 1e-8) of half of x: sound forward; at 0 no gradient in float16."""

    def call(self, x):
        half = ops.cast(ops.arange(x.shape[-1]) % 2, x.dtype)
        return ops.sqrt(ops.square(x * half) + 1e-8)


class MaskedMean(layers.Layer):
    """The mean over the first three quarters of a long axis, by sums."""

    def call(self, x):
        steps = x.shape[1]
        mask = ops.cast(ops.arange(steps) < steps * 3 // 4, x.dtype)[None, :, None]
        return ops.sum(x * mask, axis=1) / ops.sum(mask, axis=1)


class HotAttention(layers.Layer):
    """Attention without a scale: its logits grow with the square of its inputs."""

    def call(self, x):
        logits = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
        return ops.matmul(ops.softmax(logits), x) / 64


STEPS = 1024


def dense(units, spread=None, **arguments):
    if spread is not None:
        arguments["kernel_initializer"] = keras.initializers.RandomNormal(0, spread)
    return layers.Dense(units, **arguments)


def squaring():
    return [dense(16, 300.0), Squares(name="fault"), dense(16, activation="gelu")]


def epsilon():
    return [dense(16), TinyEpsilon(name="fault"), dense(16, activation="gelu")]


def epsilon_backward():
    return [dense(16), TinyEpsilonBackward(name="fault"), dense(16, activation="gelu")]


def masked_mean():
    grow = dense(STEPS * 2, 100.0, activation="relu")
    middle = [grow, layers.Reshape((STEPS, 2)), MaskedMean(name="fault")]
    return [*middle, dense(16, 0.01, activation="gelu")]


def two_faults():
    grow = dense(STEPS * 2, 100.0, activation="relu")
    middle = [grow, layers.Reshape((STEPS, 2)), MaskedMean(name="mean")]
    return [dense(16, 300.0), Squares(name="squares"), *middle, dense(16, 0.01)]


def hot_attention():
    middle = [dense(32, 100.0), layers.Reshape((4, 8)), HotAttention(name="fault")]
    return [*middle, layers.Flatten(), layers.LayerNormalization()]


def clean():
    return [
        dense(16, activation="gelu"),
        layers.LayerNormalization(),
        layers.Reshape((4, 4)),
        layers.Conv1D(8, 3, activation="relu"),
        layers.MaxPooling1D(),
        layers.Flatten(),
    ]


FAULTS = (squaring, epsilon, epsilon_backward, masked_mean, hot_attention)


def model_with(middle, outputs=4):
    model = keras.Sequential(
        [keras.Input((8,)), *middle(), layers.Dense(outputs, activation="softmax")]
    )
    # Plain SGD: of an optimizer's step it is the compiling that takes time here.
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    return model


def inputs(samples=256, seed=0):
    """Inputs and labels. Of a normal distribution, about half make a ReLU's 0."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, 8)).astype("float32")
    return x, (x[:, :4].argmax(axis=1)).astype("int32")
