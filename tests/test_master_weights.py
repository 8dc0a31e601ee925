"""What stays float32 in a half-precision model, and what it would cost otherwise."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_mixprec as mp


def model_of(policy, optimizer):
    with mp.policy_scope(policy):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, activation="relu"),
                layers.BatchNormalization(),
                layers.Dense(1, dtype="float32"),
            ]
        )
        model.compile(optimizer, "mse")
    return model


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("convert", [False, True])
def test_variables_slots_and_updates_are_float32(policy, convert):
    model = model_of("float32" if convert else policy, keras.optimizers.Adam(1e-3))
    if convert:
        mp.convert(model, policy)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    model.fit(x, x[:, :1], verbose=0)
    assert model.layers[0].compute_dtype == policy.removeprefix("mixed_")
    floats = [
        v
        for v in (*model.variables, *model.optimizer.variables)
        if keras.backend.is_float_dtype(v.dtype)
    ]
    assert {v.dtype for v in floats} == {"float32"}
    assert len(floats) > len(model.variables)


def test_an_update_too_small_for_float16_is_not_lost():
    """Beside 1.0, float16 knows no number nearer than 2**-10; here steps are 2**-14."""
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(
                1, use_bias=False, kernel_initializer="ones", dtype="mixed_float16"
            ),
            layers.Activation("linear", dtype="float32"),
        ]
    )
    model.compile(
        mp.LossScaleOptimizer(keras.optimizers.SGD(2.0**-14)),
        lambda y_true, y_pred: ops.mean(y_pred, axis=-1),
    )
    x = np.ones((64, 1), "float32")
    model.fit(x, x, batch_size=1, verbose=0)
    # The gradient is 1 in each of 64 steps, so that all of it is exact.
    assert float(ops.convert_to_numpy(model.layers[0].kernel)[0, 0]) == 1 - 64 * 2**-14
    in_float16 = np.float16(1)
    for _ in range(64):
        in_float16 = in_float16 - np.float16(2.0**-14)
    assert in_float16 == 1
