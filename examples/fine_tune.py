"""Fine-tune a trained model in mixed precision: `convert`, then train on.

    python examples/fine_tune.py
    python examples/fine_tune.py --full          # ResNet-50 with ImageNet's weights
    python examples/fine_tune.py --full --weights none      # without a network

The small size trains a network on the digits 0 to 4 in float32, as if somebody had,
then converts it and teaches it 5 to 9. The full size does so with ResNet-50 and digits
of 224 x 224 pixels; its weights are downloaded, or with `--weights none` trained first.
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


def enlarged(images):
    """Return the images as ResNet-50 takes them: 224 x 224, colours in its order."""
    images = images.repeat(3, axis=-1) * 255
    images = keras.ops.image.resize(images, (224, 224))
    images = keras.applications.resnet.preprocess_input(images)
    return keras.ops.convert_to_numpy(images)


def small_base():
    """Return a network that makes features of images of 8x8 pixels."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.GlobalMaxPooling2D(),
        ],
        name="base",
    )


def trained_by_somebody(base, x, y, epochs):
    """Return the base, trained in float32 on what it will not be used for."""
    whole = keras.Sequential([base, layers.Dense(5, activation="softmax")])
    whole.compile("adam", "sparse_categorical_crossentropy")
    whole.fit(x, y, epochs=epochs, verbose=0)
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


def load(full, weights):
    """Return a trained base, and images of the digits 5 to 9 with their classes."""
    x, y = digits(5)
    if not full:
        return trained_by_somebody(small_base(), *digits(0), epochs=5), x, y
    base = keras.applications.ResNet50(
        include_top=False, weights=weights, input_shape=(224, 224, 3), pooling="avg"
    )
    if weights is None:
        others, classes = digits(0)
        trained_by_somebody(base, enlarged(others), classes, epochs=15)
    return base, enlarged(x), y


def main(arguments=None):
    """Fine-tune. Returns 0 if 90% of the unseen digits are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="ResNet-50, 224 x 224")
    parser.add_argument("--weights", default="imagenet", help="or none, or a file")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    base, x, y = load(args.full, None if args.weights == "none" else args.weights)
    model = with_new_head(base, 5)
    mp.convert(model, args.policy)  # mixed precision
    train(model, x, y, 1e-2, 8)
    base.trainable = True
    # A new `compile`, so that the base learns: the scale starts anew, as the slots do.
    right = train(model, x, y, 1e-4 if args.full else 1e-3, 10)
    return 0 if right > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
