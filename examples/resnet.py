"""Image classification with ResNet-50 in mixed precision.

    python examples/resnet.py
    python examples/resnet.py --full
    python examples/resnet.py --full --images path/to/imagenet/train

The small size trains a shallow ResNet-V2 of the same blocks on the 1,797 digits that
scikit-learn ships. The full one trains ResNet-50: on a folder with one subfolder per
class, or without one on the same digits, enlarged to 224 x 224 pixels.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_mixprec as mp  # mixed precision


def digits():
    """Return train and test images of 8x8 pixels in [0, 1], and their digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=0.3, random_state=0)


def enlarged(images):
    """Return the images as photographs come: 224 x 224, three colours, 0 to 255."""
    images = images.repeat(3, axis=-1) * 255
    return keras.ops.convert_to_numpy(keras.ops.image.resize(images, (224, 224)))


def small_resnet(classes):
    """Return a ResNet of three bottleneck blocks."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    for filters, stride in ((8, 1), (16, 2), (32, 2)):
        x = bottleneck(x, filters, stride)
    x = layers.GlobalAveragePooling2D()(normalized(x))
    return keras.Model(inputs, outputs(x, classes), name="small_resnet")


def bottleneck(x, filters, stride):
    """Return x plus a 1x1, 3x3, 1x1 detour, as in He et al., 2016."""
    y = normalized(x)
    shortcut = layers.Conv2D(4 * filters, 1, strides=stride)(y)
    y = layers.Conv2D(filters, 1, use_bias=False)(y)
    y = layers.Conv2D(filters, 3, strides=stride, padding="same", use_bias=False)(
        normalized(y)
    )
    y = layers.Conv2D(4 * filters, 1)(normalized(y))
    return layers.Add()([shortcut, y])


def normalized(x):
    """Return x through BatchNormalization and ReLU."""
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def outputs(x, classes):
    """Return probabilities, in float32: gradients of a float16 softmax overflow."""
    return layers.Dense(classes, "softmax", dtype="float32")(x)  # mixed precision


def resnet50(classes):
    """Return ResNet-50 for 224 x 224 colour images."""
    base = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg")
    inputs = keras.Input((224, 224, 3))
    x = keras.applications.resnet.preprocess_input(inputs)
    return keras.Model(inputs, outputs(base(x), classes), name="resnet50")


def load(args):
    """Return the model, and what `fit` is to train it on."""
    if args.full and args.images:
        data = keras.utils.image_dataset_from_directory(
            args.images, image_size=(224, 224), batch_size=128
        )
        return resnet50(len(data.class_names)), {"x": data}
    x, x_test, y, y_test = digits()
    if args.full:
        return resnet50(10), {"x": enlarged(x), "y": y, "batch_size": 128}
    data = {"x": x, "y": y, "batch_size": 64, "validation_data": (x_test, y_test)}
    return small_resnet(10), data


def main(arguments=None):
    """Train. Returns 0 if the digits are learned (or it saw others), 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="ResNet-50, 224 x 224")
    parser.add_argument("--images", help="folder for --full, a subfolder per class")
    parser.add_argument("--epochs", type=int, help="default: 4, with --full 16")
    args = parser.parse_args(arguments)
    epochs = args.epochs or (16 if args.full else 4)
    keras.utils.set_random_seed(0)
    mp.set_policy(args.policy)  # mixed precision
    model, data = load(args)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, epochs * 20)
    model.compile(
        keras.optimizers.Adam(1e-3 if args.full else rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(
        **data,
        epochs=epochs,
        verbose=2,
        callbacks=[mp.MixedPrecisionMonitor()],  # mixed precision
    ).history
    if args.images:
        return 0
    if args.full:
        return 0 if history["accuracy"][-1] > 0.9 else 1
    return 0 if history["val_accuracy"][-1] > 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
