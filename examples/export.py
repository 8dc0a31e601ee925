"""Train in mixed precision, export in float32.

    python examples/export.py

Converters (TFLite) and many serving runtimes know no half-precision graphs, and a
CPU that serves gains nothing from them. `to_float32` gives the model its policies
back; the weights were float32 all the time. Exports what the backend can: a
SavedModel on TensorFlow and JAX, ONNX or a torch program on torch.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

import keras_mixprec as mp  # mixed precision


def build_model():
    """Return a small network."""
    return keras.Sequential(
        [
            keras.Input((16,), batch_size=None),
            layers.Dense(64, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(1),
        ]
    )


def export(model, folder):
    """Write the model in a format of its backend. Returns the format."""
    formats = {"tensorflow": "tf_saved_model", "jax": "tf_saved_model"}
    chosen = formats.get(keras.backend.backend(), "torch")
    suffix = ".pt2" if chosen == "torch" else ""
    model.export(pathlib.Path(folder) / f"model{suffix}", format=chosen, verbose=False)
    return chosen


def main(arguments=None):
    """Train, go back, export. Returns 0 if half and float32 agree, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="more samples")
    parser.add_argument("--output", help="folder; a temporary one if not given")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(100_000 if args.full else 2048, 16))
    x, y = x.astype("float32"), x.sum(axis=1, keepdims=True).astype("float32") / 4
    model = build_model()
    mp.convert(model, args.policy)  # mixed precision
    model.compile(keras.optimizers.Adam(0.01), "mse")
    monitor = mp.MixedPrecisionMonitor()  # mixed precision
    model.fit(x, y, batch_size=64, epochs=3, verbose=2, callbacks=[monitor])
    half = model.predict(x[:256], verbose=0)
    mp.to_float32(model)  # mixed precision
    whole = model.predict(x[:256], verbose=0)
    difference = float(np.abs(half - whole).max())
    print(f"Largest difference between half precision and float32: {difference:.1e}")
    print("Exported as", export(model, args.output or tempfile.mkdtemp()))
    return 0 if difference < 0.05 and {"float32"} == dtypes(model) else 1


def dtypes(model):
    """Return the types in which the layers compute."""
    return {layer.compute_dtype for layer in model.layers}


if __name__ == "__main__":
    sys.exit(main())
