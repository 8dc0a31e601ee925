"""Seeded inputs for any model, and weights that carry signals through it."""

import zlib

import keras
import numpy as np
from keras import layers

SIZE = 8  # Whatever a model leaves open: sequence lengths and the like.
IDS = 16


def sample_for(model, rows=2):
    """Return seeded inputs for a model: ids, masks of ones, numbers."""
    rng = np.random.default_rng(zlib.crc32(model.name.encode()) + rows)
    if isinstance(model, keras.Sequential):
        model = model._functional
    raw = any(isinstance(x, layers.Rescaling) for x in model._flatten_layers())
    scale = 255.0 if raw else 1.0
    return keras.tree.map_structure(
        lambda x: _sample(x, rng, rows, scale), model._inputs_struct
    )


def _sample(x, rng, rows, scale):
    shape = [rows, *(SIZE if size is None else size for size in x.shape[1:])]
    if x.name == "masks":  # SAM's: one per image, four times the embedding's size.
        shape = [rows, 1, 4 * SIZE, 4 * SIZE, *shape[4:]]
    elif "mask" in x.name:
        return np.ones(shape, x.dtype)
    if "segment" in x.name or "label" in x.name:
        return np.zeros(shape, x.dtype)
    if keras.backend.is_float_dtype(x.dtype):
        return scale * _numbers(rng, shape)
    return rng.integers(1, IDS, shape).astype(x.dtype)


def _numbers(rng, shape):
    """Normal numbers; in images mostly one colour each, as neighbours are alike.

    Features of pure noise are the same for every image, and what BatchNormalization
    then divides by is next to nothing: any rounding would be blown up.
    """
    numbers = rng.normal(size=shape)
    if len(shape) == 4:
        numbers = 0.2 * numbers + rng.normal(size=(shape[0], 1, 1, shape[3]))
    return numbers.astype("float32")


def calibrate(model):
    """Give a model with random weights signals like those of a trained one.

    BatchNormalization gets the statistics of a batch. Its smallest variances are
    raised: with random weights some channels hardly vary, and dividing by that blows
    up any rounding until the output is chance. Without BatchNormalization, kernels
    grow as He et al., 2015, have it for ReLU.
    """
    norms = [x for x in model._flatten_layers() if hasattr(x, "moving_variance")]
    momenta = [x.momentum for x in norms]
    for norm in norms:
        norm.momentum = 0.0
    model(sample_for(model, rows=8), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        variance = keras.ops.convert_to_numpy(norm.moving_variance)
        norm.moving_variance.assign(variance + 0.3 * variance.mean())
    if not norms:
        for variable in model.trainable_variables:
            if variable.name == "kernel":
                variable.assign(variable * 2**0.5)
