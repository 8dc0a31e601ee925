"""The benchmarked models, each with a batch of random data and its loss.

`build(name, size)` builds under the global dtype policy. What each head is:

- `bert`: BERT-base's encoder without dropout (so that Keras may take its fused
  attention), a two-class classifier on the first token. Adam.
- `resnet`: ResNet-50 with a 1000-class head.
- `dlrm`: 13 dense features, 26 ids into one table, dot interactions, one logit. On
  TensorFlow the table's gradient is `IndexedSlices`.
- `mlp`: four wide Dense layers, 10 classes.

Heads compute in float32, as Keras's mixed-precision guide asks for.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import layers
from keras import ops
from shapes import SHAPES


@dataclasses.dataclass
class Workload:
    """A model to train and what to train it on.

    Args:
        model: `keras.Model`, not compiled.
        x: NumPy array or dict of them, one batch.
        y: NumPy array, one batch.
        loss: `keras.losses.Loss`.
    """

    model: keras.Model
    x: Any
    y: np.ndarray
    loss: keras.losses.Loss

    @property
    def batch(self) -> int:
        """Samples per step."""
        return len(self.y)


def build(name: str, size: str = "full", batch: int | None = None) -> Workload:
    """Build one workload under the global dtype policy.

    Args:
        name: A key of `SHAPES`.
        size: `"full"`, or `"small"`: seconds on a CPU. Defaults to `"full"`.
        batch: Samples per step. Defaults to the shape's.
    """
    shape = SHAPES[name][size]
    shape = dataclasses.replace(shape, batch=batch or shape.batch)
    keras.utils.set_random_seed(0)
    return _BUILDERS[name](shape, np.random.default_rng(0))


def _bert(shape, rng):
    ids = keras.Input((shape.length,), dtype="int32", name="ids")
    x = layers.Embedding(shape.vocabulary, shape.width)(ids)
    x = layers.LayerNormalization(epsilon=1e-12)(Positions()(x))
    for _ in range(shape.depth):
        x = _encoder_block(x, shape)
    x = layers.Dense(shape.width, activation="tanh")(x[:, 0])
    x = layers.Dense(2, dtype="float32")(x)
    inputs = rng.integers(shape.vocabulary, size=(shape.batch, shape.length))
    return Workload(
        keras.Model(ids, x, name="bert"),
        inputs.astype("int32"),
        rng.integers(2, size=shape.batch).astype("int32"),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


class Positions(layers.Layer):
    """Adds a trained vector to each position, one for all samples, as BERT does.

    Looked up by each sample, its gradient would be a scatter in which the samples
    contend for the same few rows, which takes a GPU longer the fewer of them are 0.
    """

    def build(self, input_shape):
        """Create the vectors, shape `(length, width)`."""
        self.vectors = self.add_weight(
            name="vectors",
            shape=input_shape[1:],
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def call(self, x):
        """Return `x` with the vectors added."""
        return x + self.vectors


def _encoder_block(x, shape):
    attention = layers.MultiHeadAttention(shape.heads, shape.width // shape.heads)
    x = layers.LayerNormalization(epsilon=1e-12)(x + attention(x, x))
    hidden = layers.Dense(4 * shape.width, activation="gelu")(x)
    hidden = layers.Dense(shape.width)(hidden)
    return layers.LayerNormalization(epsilon=1e-12)(x + hidden)


def _resnet(shape, rng):
    side = (shape.length, shape.length, 3)
    image = keras.Input(side, name="image")
    if shape.depth == 50:
        body = keras.applications.ResNet50(
            include_top=False, weights=None, input_tensor=image, pooling="avg"
        )
        x = body.output
    else:
        x = _residual_blocks(image, shape.depth)
    x = layers.Dense(1000, dtype="float32")(x)
    return Workload(
        keras.Model(image, x, name="resnet"),
        rng.normal(size=(shape.batch, *side)).astype("float32"),
        rng.integers(1000, size=shape.batch).astype("int32"),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


def _residual_blocks(x, depth):
    x = layers.Conv2D(8, 3, padding="same")(x)
    for _ in range(depth):
        y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
        x = layers.ReLU()(layers.Add()([x, y]))
    return layers.GlobalAveragePooling2D()(x)


def _dlrm(shape, rng):
    dense = keras.Input((13,), name="numbers")
    ids = keras.Input((26,), dtype="int32", name="ids")
    bottom = _mlp_layers(dense, (8 * shape.width, 4 * shape.width, shape.width))
    table = layers.Embedding(shape.vocabulary, shape.width, name="table")(ids)
    vectors = ops.concatenate([ops.expand_dims(bottom, 1), table], axis=1)
    dots = ops.matmul(vectors, ops.transpose(vectors, (0, 2, 1)))
    # All pairs; the reference takes the lower triangle of the same product.
    x = layers.Concatenate()([bottom, layers.Flatten()(dots)])
    x = _mlp_layers(x, (16 * shape.width, 8 * shape.width, 4 * shape.width))
    x = layers.Dense(1, dtype="float32")(x)
    return Workload(
        keras.Model({"numbers": dense, "ids": ids}, x, name="dlrm"),
        {
            "numbers": rng.normal(size=(shape.batch, 13)).astype("float32"),
            "ids": rng.integers(shape.vocabulary, size=(shape.batch, 26)).astype(
                "int32"
            ),
        },
        rng.integers(2, size=(shape.batch, 1)).astype("float32"),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )


def _mlp_layers(x, widths):
    for width in widths:
        x = layers.Dense(width, activation="relu")(x)
    return x


def _mlp(shape, rng):
    inputs = keras.Input((shape.width,), name="features")
    x = _mlp_layers(inputs, [shape.width] * shape.depth)
    x = layers.Dense(10, dtype="float32")(x)
    return Workload(
        keras.Model(inputs, x, name="mlp"),
        rng.normal(size=(shape.batch, shape.width)).astype("float32"),
        rng.integers(10, size=shape.batch).astype("int32"),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


_BUILDERS = {"bert": _bert, "resnet": _resnet, "dlrm": _dlrm, "mlp": _mlp}
