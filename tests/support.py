"""What several test files need: small models, exact data, snapshots of state."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_mixprec as mp

STATELESS = keras.backend.backend() != "tensorflow"
# Marks for what JAX compiles operation by operation, for half a minute.
SLOW_ON_JAX = [pytest.mark.slow] if keras.backend.backend() == "jax" else []


def variables(*values):
    return [keras.Variable(np.asarray(v, "float32")) for v in values]


def tensors(*values):
    return [ops.convert_to_tensor(np.asarray(v, "float32")) for v in values]


def scaled_step(optimizer, grads, trainable):
    """Apply gradients of a loss that `optimizer` scaled."""
    scale = np.float32(optimizer.loss_scale)
    optimizer.apply(
        tensors(*(np.asarray(g, "float32") * scale for g in grads)), trainable
    )


def snapshot(*owners):
    """Variable path and position -> value, of models, optimizers or lists."""
    found = {}
    for owner in owners:
        kept = owner if isinstance(owner, list) else owner.variables
        if isinstance(owner, keras.Model):
            kept = kept + owner.metrics_variables
        for v in kept:
            found[f"{len(found)} {v.path}"] = np.array(ops.convert_to_numpy(v))
    return found


def assert_same_bits(left, right, but=()):
    """Compare snapshots bit for bit, except for names that contain one of `but`."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        if not any(word in name for word in but):
            assert value.tobytes() == right[name].tobytes(), name


def assert_slots_are_used(adam_snapshot):
    """Some momentum and some velocity is not 0: to lose them would show."""
    for slot in ("momentum", "velocity"):
        assert any(v.any() for name, v in adam_snapshot.items() if slot in name), slot


def assert_finite(owner_snapshot):
    for name, value in owner_snapshot.items():
        assert np.isfinite(value).all(), name


# What a skipped step may change.
SCALING = (
    "step_counter",
    "dynamic_scale",
    "hysteresis_left",
    "overflow_count",
    "consecutive_overflows",
    "seed",
)


def classifier(dropout=0.1, **dense):
    """A net with all kinds of state: weights, BatchNormalization, Dropout's seed."""
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, **dense),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(dropout, seed=1),
            keras.layers.Dense(3, activation="softmax", dtype="float32"),
        ]
    )


def data(samples=128, bad=()):
    """Inputs and labels; every sample in `bad` overflows float16."""
    x = np.random.default_rng(0).normal(size=(samples, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)
    x[list(bad)] = 1e6
    return x, y


def compiled(model, optimizer="adam", **kwargs):
    model.compile(
        optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], **kwargs
    )
    return model


def half_classifier(optimizer="adam", dropout=0.1, **kwargs):
    with mp.policy_scope("mixed_float16"):
        return compiled(classifier(dropout), optimizer, **kwargs)


def assert_skipped_whole(model, x, y):
    """Train a `classifier` on a batch that overflows: no bit of its state changes."""
    before = snapshot(model, model.optimizer)
    model.train_on_batch(x, y)
    after = snapshot(model, model.optimizer)
    # Metrics start anew with each batch.
    assert_same_bits(before, after, but=(*SCALING, "loss/", "accuracy/"))


def assert_overflows_are_skipped(model):
    """Train a `classifier` on four batches, of which the second and third overflow."""
    x, y = data(64)
    model.train_on_batch(x, y)
    assert_skipped_whole(model, np.full_like(x, 1e6), y)
    assert_skipped_whole(model, np.full_like(x, np.nan), y)
    assert model.optimizer.overflow_count == 2
    model.train_on_batch(x, y)
    assert int(model.optimizer.iterations) == 2
