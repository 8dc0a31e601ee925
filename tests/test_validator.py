"""`PrecisionValidator`: what it logs, and that promotion mends a run."""

import logging
import math

import keras
import numpy as np
import pytest
from keras import layers
from planted import clean
from planted import inputs
from planted import masked_mean
from planted import model_with
from planted import squaring
from planted import two_faults
from support import assert_same_bits
from support import assert_slots_are_used
from support import snapshot

import keras_mixprec as mp

HALF_BUILT = "built in half"
pytestmark = pytest.mark.filterwarnings("ignore:Epoch .* steps overflowed")


def half_model(middle, built=False):
    if not built:
        # Without the dry run, which would find what overflows at once.
        return mp.convert(model_with(middle), dry_run=False)
    with mp.policy_scope("mixed_float16"):
        model = keras.Sequential(
            [keras.Input((8,)), *middle(), layers.Dense(4, "softmax", dtype="float32")]
        )
        model.compile("adam", "sparse_categorical_crossentropy")
    return model


def fit(model, validator, epochs=2, callbacks=(), **arguments):
    x, y = inputs(128)
    arguments = {"batch_size": 32, "verbose": 0, **arguments}
    callbacks = [*callbacks, validator]
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments).history


def test_logs_of_a_clean_model():
    model, held_out = half_model(clean), inputs(64, seed=9)
    validator = mp.PrecisionValidator(held_out)
    logs = fit(model, validator, validation_data=held_out, validation_batch_size=64)
    assert all(0 < error < 0.01 for error in logs["precision_error"])
    assert all(share > 0.9 for share in logs["precision_agreement"])
    np.testing.assert_allclose(logs["val_loss_float32"], logs["val_loss"], rtol=2e-3)
    assert logs["val_loss_float32"] != logs["val_loss"]
    exact = mp.to_float32(model).evaluate(*held_out, batch_size=64, verbose=0)
    assert logs["val_loss_float32"][-1] == pytest.approx(exact, rel=1e-5)
    assert validator.promotions == []


def test_sample_weights_count_as_in_validation_data():
    x, y = inputs(64, seed=9)
    held_out = (x, y, np.linspace(0, 3, 64, dtype="float32"))
    model, validator = half_model(clean), mp.PrecisionValidator(held_out)
    logs = fit(model, validator, 1, validation_data=held_out, validation_batch_size=64)
    np.testing.assert_allclose(logs["val_loss_float32"], logs["val_loss"], rtol=2e-3)
    without = model.evaluate(x, y, batch_size=64, verbose=0)
    assert abs(without / logs["val_loss"][0] - 1) > 0.1


def test_every_so_many_epochs_and_seen_by_callbacks_before_it():
    seen = []
    early = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append("precision_error" in logs)
    )
    validator = mp.PrecisionValidator(inputs(16)[0], every=2)
    logs = fit(half_model(clean), validator, epochs=4, callbacks=[early])
    assert seen == [False, True, False, True]
    assert len(logs["precision_error"]) == 2
    assert "val_loss_float32" not in logs


def test_validation_changes_nothing_in_the_run():
    def final(callbacks):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = half_model(
            lambda: [*clean(), layers.BatchNormalization(), layers.Dropout(0.2, seed=1)]
        )
        x, y = inputs(128)
        model.fit(x, y, epochs=2, batch_size=32, verbose=0, callbacks=callbacks)
        return snapshot(model, model.optimizer)

    assert_same_bits(final([]), final([mp.PrecisionValidator(inputs(16, 9))]))


def test_warns_once():
    validator = mp.PrecisionValidator(inputs(64, seed=9))
    with pytest.warns(UserWarning, match="off by .* in half precision") as caught:
        logs = fit(half_model(squaring), validator, epochs=3)
    assert len([w for w in caught if "half precision" in str(w.message)]) == 1
    assert min(logs["precision_error"]) > 0.01


def test_stops():
    validator = mp.PrecisionValidator(inputs(64, seed=9), on_violation="stop")
    with pytest.warns(UserWarning, match="half precision"):
        logs = fit(half_model(squaring), validator, epochs=3)
    assert len(logs["loss"]) == 1


@pytest.mark.parametrize("built", [False, True])
def test_promotes_the_layer_to_blame_and_trains_on(built, caplog):
    model = half_model(squaring, built)
    optimizer = model.optimizer
    validator = mp.PrecisionValidator(
        inputs(64, seed=9), every=2, on_violation="promote"
    )
    with caplog.at_level(logging.WARNING, "keras_mixprec"):
        logs = fit(model, validator, epochs=4)
    assert [(one.epoch, one.path) for one in validator.promotions] == [(1, "fault")]
    assert "own error" in validator.promotions[0].reason
    reason = validator.promotions[0].reason
    assert f"'fault' is in float32 from now on ({reason})" in caplog.text
    policies = {layer.name: layer.dtype_policy.name for layer in model.layers}
    assert policies.pop("fault") == "float32"
    *others, output = policies.values()
    assert (set(others), output) == ({"mixed_float16"}, "float32")
    assert max(logs["precision_error"]) < 0.01
    assert model.optimizer is optimizer
    # 4 batches in each of 4 epochs, over the change.
    assert int(optimizer.inner_optimizer.iterations) == 16
    assert np.isfinite(logs["loss"]).all()


def test_promotion_keeps_the_optimizers_state():
    model, seen = half_model(squaring, built=True), []  # Adam: two slots a weight.
    validator = mp.PrecisionValidator(inputs(64, seed=9), on_violation="promote")
    plain = validator._promote

    def watched(epoch):
        seen.append(snapshot(model.optimizer, model))
        found = plain(epoch)
        seen.append(snapshot(model.optimizer, model))
        return found

    validator._promote = watched
    fit(model, validator, epochs=1)
    assert [one.path for one in validator.promotions] == ["fault"]
    assert model.optimizer.overflow_count == 0
    assert_slots_are_used(seen[0])
    assert_same_bits(*seen)


def test_works_when_outputs_are_nan_already():
    model = half_model(masked_mean)
    validator = mp.PrecisionValidator(inputs(64, seed=9), on_violation="promote")
    logs = fit(model, validator, epochs=3)
    assert [one.path for one in validator.promotions] == ["fault"]
    assert "not finite" in validator.promotions[0].reason
    assert math.isnan(logs["loss"][0])
    assert np.isfinite(logs["loss"][1:]).all()
    assert max(logs["precision_error"]) < 0.01


def test_of_two_faults_both_are_promoted_and_nothing_else_is():
    model = half_model(two_faults)
    validator = mp.PrecisionValidator(inputs(64, seed=9), on_violation="promote")
    logs = fit(model, validator)
    assert [one.path for one in validator.promotions] == ["mean", "squares"]
    policies = {layer.name: layer.dtype_policy.name for layer in model.layers}
    kept = [name for name, policy in policies.items() if policy == "float32"]
    assert kept == ["squares", "mean", model.layers[-1].name]
    assert max(logs["precision_error"]) < 0.01


def test_the_limit_of_promotions_holds():
    model = half_model(squaring)
    validator = mp.PrecisionValidator(
        inputs(64, seed=9), tolerance=1e-12, on_violation="promote", max_promotions=1
    )
    with pytest.warns(UserWarning, match="half precision"):
        fit(model, validator, epochs=2)
    assert len(validator.promotions) == 1


def test_promotes_until_all_is_float32_if_need_be():
    model = half_model(squaring)
    validator = mp.PrecisionValidator(
        inputs(64, seed=9), tolerance=1e-12, on_violation="promote"
    )
    logs = fit(model, validator, epochs=3)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert logs["precision_error"][-1] == 0
    assert int(model.optimizer.inner_optimizer.iterations) == 12


def test_weights_that_are_nan_are_not_a_matter_of_precision():
    model = half_model(clean)
    # Of the last layer: on some CPUs relu turns NaN into 0.
    kernel = model.layers[-1].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    validator = mp.PrecisionValidator(inputs(16, seed=9), on_violation="promote")
    logs = fit(model, validator, epochs=1)
    assert math.isnan(logs["precision_error"][0])
    assert validator.promotions == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"every": 0}, "Received: every=0"),
        ({"tolerance": -1.0}, "Received: tolerance=-1.0"),
        ({"on_violation": "raise"}, "Received: on_violation='raise'"),
        ({"max_promotions": -1}, "Received: max_promotions=-1"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mp.PrecisionValidator(inputs(8), **arguments)
