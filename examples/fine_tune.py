"""Fine-tune a trained model in mixed precision: `convert`, then train on.

    python examples/fine_tune.py
    python examples/fine_tune.py --full          # ResNet-50 with ImageNet's weights

The small size trains a network on the digits 0 to 4 in float32, as if somebody had,
then converts it and teaches it 5 to 9. The full size downloads weights.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers
from sklearn.datasets import load_digits

import keras_mixprec as mp  # mixed precision


def digits(wanted):
    """Return images of 8x8 pixels in [0, 1] of five digits, and classes 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= wanted) & (labels < wanted + 5)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    return images[chosen], labels[chosen] - wanted


def somebody_elses_model():
    """Return a base trained in float32 on the digits 0 to 4."""
    base = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.GlobalMaxPooling2D(),
        ],
        name="base",
    )
    whole = keras.Sequential([base, layers.Dense(5, activation="softmax")])
    whole.compile("adam", "sparse_categorical_crossentropy")
    whole.fit(*digits(0), epochs=5, verbose=0)
    return base


def with_new_head(base, classes):
    """Return the base, frozen, with an output layer for other classes."""
    base.trainable = False
    inputs = keras.Input(base.input_shape[1:])
    x = base(inputs, training=False)
    return keras.Model(inputs, layers.Dense(classes, activation="softmax")(x))


def train(model, x, y, rate, epochs):
    """Compile and fit. Returns the accuracy on the last fifth."""
    model.compile(
        keras.optimizers.Adam(rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(
        x,
        y,
        batch_size=32,
        epochs=epochs,
        validation_split=0.2,
        verbose=2,
        callbacks=[mp.MixedPrecisionMonitor()],  # mixed precision
    )
    return history.history["val_accuracy"][-1]


def main(arguments=None):
    """Fine-tune. Returns 0 if 90% of the unseen digits are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    if args.full:
        base = keras.applications.ResNet50(include_top=False, pooling="avg")
        images, labels = digits(5)
        images = keras.ops.image.resize(images.repeat(3, axis=-1) * 255, (224, 224))
        x, y = keras.applications.resnet.preprocess_input(images), labels
    else:
        base, (x, y) = somebody_elses_model(), digits(5)
    model = with_new_head(base, 5)
    mp.convert(model, args.policy)  # mixed precision
    train(model, x, y, 1e-2, 8)
    base.trainable = True
    # A new `compile`, so that the base learns: the scale starts anew, as the slots do.
    return 0 if train(model, x, y, 1e-3, 10) > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
