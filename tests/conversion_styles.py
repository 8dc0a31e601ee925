"""The ways to write a model: in a row, as a graph, in Python, nested, shared."""

import keras
import numpy as np
from keras import layers

SERIES = (6, 8)


@keras.saving.register_keras_serializable(package="conversion_cases")
class Block(layers.Layer):
    """Sublayers in plain attributes, a list and a dict, none given its policy."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, "relu")
        self.more = [layers.Dense(units), layers.LayerNormalization()]
        self.named = {"attend": layers.MultiHeadAttention(2, 4)}

    def build(self, shape):
        for sublayer in (self.first, *self.more):
            sublayer.build(shape)
        self.named["attend"].build(shape, shape)

    def call(self, x):
        y = self.first(x)
        for sublayer in self.more:
            y = y + sublayer(y)
        return x + self.named["attend"](y, y)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="conversion_cases")
class HardCoded(layers.Layer):
    """Insists on float32 for its softmax, and casts what comes out of it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(8)
        self.softmax = layers.Softmax(dtype="float32")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        gates = keras.ops.cast(self.softmax(self.dense(x)), self.compute_dtype)
        return x * gates


@keras.saving.register_keras_serializable(package="conversion_cases")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(8)
        self.hard = HardCoded()
        self.head = layers.Dense(3, activation="softmax")

    def call(self, x):
        return {"classes": self.head(self.hard(self.block(x)))}


def subclassed():
    model = Subclassed(name="subclassed")
    model(np.ones((2, *SERIES), "float32"))
    model.input_spec = None
    model._inputs_struct = keras.KerasTensor((None, *SERIES))
    return model


def sequential():
    return keras.Sequential(
        [keras.Input(SERIES), Block(8), HardCoded(), layers.Dense(3, "softmax")]
    )


def shared_and_nested():
    shared = layers.Dense(8, "tanh")
    inner = keras.Sequential([keras.Input(SERIES), shared, Block(8)])
    x, z = keras.Input(SERIES, name="left"), keras.Input(SERIES, name="right")
    y = keras.ops.concatenate([inner(shared(x)), inner(z)], axis=-1)
    each = keras.Sequential([keras.Input((16,)), layers.Dense(8), HardCoded()])
    y = layers.TimeDistributed(each)(y)
    y = layers.Bidirectional(layers.LSTM(4))(y)
    outputs = {"one": layers.Dense(3, "softmax")(y), "two": layers.Dense(4)(y)}
    return keras.Model({"left": x, "right": z}, outputs)


def operations_only():
    x = keras.Input(SERIES)
    y = layers.Dense(8)(x)
    y = keras.ops.softmax(keras.ops.matmul(y, keras.ops.transpose(y, (0, 2, 1))))
    return keras.Model(x, keras.ops.mean(y * 2.0 + 1.0, axis=-1))


STYLES = {
    "sequential": sequential,
    "shared_and_nested": shared_and_nested,
    "subclassed": subclassed,
    "operations_only": operations_only,
}
