"""`AdaptivePrecision`: the rule by hand, and runs that settle."""

import itertools
import logging

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from planted import clean
from planted import epsilon
from planted import epsilon_backward
from planted import hot_attention
from planted import inputs
from planted import masked_mean
from planted import model_with
from planted import squaring
from support import SLOW_ON_JAX
from support import assert_same_bits
from support import assert_slots_are_used
from support import snapshot

import keras_mixprec as mp
from keras_mixprec import hardware
from keras_mixprec.backend import engine
from keras_mixprec.hysteresis import Hysteresis
from keras_mixprec.hysteresis import HysteresisRule
from keras_mixprec.hysteresis import PrecisionChange
from keras_mixprec.reporting.changes import spans

pytestmark = pytest.mark.filterwarnings("ignore:Epoch .* steps overflowed")


def to_float32(policy):
    return "float32"


def simulate(troubled, epochs=60, largest=None, rule=None):
    """Changes of one layer that is to blame in epochs where `troubled(epoch, half)`."""
    hysteresis = Hysteresis(rule or HysteresisRule(2, 4, 16.0))
    policies, changes = {"a": "mixed_float16", "b": "mixed_float16"}, []
    for epoch in range(epochs):
        blamed = "a" if troubled(epoch, policies["a"]) else None
        sizes = {"a": 1.0 if largest is None else largest(epoch)}
        new = hysteresis.after_epoch(epoch, epochs, policies, blamed, sizes, to_float32)
        for change in new:
            policies[change.path] = change.after
        changes += new
    return changes


def test_one_troubled_epoch_is_not_enough():
    assert simulate(lambda epoch, policy: epoch in (3, 5, 7)) == []


def test_leaves_comes_back_and_stays():
    (left, back) = simulate(lambda epoch, policy: epoch in (3, 4))
    assert (left.epoch, left.before, left.after) == (4, "mixed_float16", "float32")
    assert (back.epoch, back.before, back.after) == (8, "float32", "mixed_float16")


def test_a_layer_that_always_overflows_in_half_settles():
    changes = simulate(lambda epoch, policy: policy == "mixed_float16")
    # Calm for 4, 8, 16 epochs; on probation one troubled epoch is enough.
    assert [c.epoch for c in changes] == [1, 5, 6, 14, 15, 31, 32]
    assert changes[-1].after == "float32"
    assert max(c.epoch for c in changes) < 40


def test_without_headroom_nothing_comes_back():
    large = simulate(lambda epoch, policy: epoch < 2, largest=lambda epoch: 5000.0)
    assert [c.after for c in large] == ["float32"]
    small = simulate(lambda epoch, policy: epoch < 2, largest=lambda epoch: 4000.0)
    assert [c.after for c in small] == ["float32", "mixed_float16"]


def test_nothing_comes_back_in_the_last_third():
    changes = simulate(lambda epoch, policy: epoch in (8, 9), epochs=18)
    assert [c.epoch for c in changes] == [9]


@pytest.mark.parametrize("seen", [True, False])
def test_what_always_overflows_has_left_for_good_before_the_last_third(seen):
    """Whatever the numbers; unseen at first, it is named an epoch later."""
    for epochs, patience, calm in itertools.product(range(6, 70), (1, 2, 3), range(9)):
        hysteresis = Hysteresis(HysteresisRule(patience, calm + 1, 16.0))
        policies, changes, named = {"a": "mixed_float16"}, [], seen
        for epoch in range(epochs):
            blamed = ("a" if named else "") if policies["a"] != "float32" else None
            named = seen or blamed == ""
            new = hysteresis.after_epoch(
                epoch, epochs, policies, blamed, {"a": 1.0}, to_float32
            )
            policies |= {change.path: change.after for change in new}
            changes += new
        assert policies["a"] == "float32"
        assert all(3 * (c.epoch + 1) <= 2 * epochs for c in changes), (epochs, changes)


def test_trouble_without_a_name_changes_nothing():
    hysteresis = Hysteresis(HysteresisRule(1, 1, 1.0))
    assert hysteresis.after_epoch(0, 9, {}, "", {}, to_float32) == []


# -- runs ---------------------------------------------------------------------


def fit(model, adaptive, epochs, x=None, callbacks=(), **arguments):
    given, y = inputs(128)
    x = given if x is None else x
    arguments = {"batch_size": 32, "shuffle": False, "verbose": 0, **arguments}
    callbacks = [*callbacks, adaptive]
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments).history


def settled(adaptive, epochs):
    return all(change.epoch + 1 <= epochs * 2 / 3 for change in adaptive.changes)


@pytest.mark.parametrize(
    "fault",
    [
        masked_mean,
        pytest.param(hot_attention, marks=SLOW_ON_JAX),
        pytest.param(epsilon, marks=SLOW_ON_JAX),
        # Without weights of its own: the gradients that it hands on overflow.
        pytest.param(epsilon_backward, marks=SLOW_ON_JAX),
    ],
)
def test_a_layer_that_overflows_leaves_and_the_plan_settles(fault, caplog, tmp_path):
    model = mp.convert(model_with(fault), dry_run=False)
    optimizer = model.optimizer
    adaptive = mp.AdaptivePrecision(calm_epochs=3)
    with caplog.at_level(logging.WARNING, "keras_mixprec"):
        logs = fit(model, adaptive, epochs=12)
    assert {change.path for change in adaptive.changes} == {"fault"}
    assert adaptive.changes[0].epoch == 1
    assert model.get_layer("fault").dtype_policy.name == "float32"
    assert settled(adaptive, 12)
    first = adaptive.changes[0].reason
    assert "overflows in a row" in first
    assert f"'fault' goes from mixed_float16 to float32 ({first})" in caplog.text
    assert np.isfinite(logs["loss"][-4:]).all()
    assert logs["precision_changes"][1] == 1
    assert sum(logs["precision_changes"]) == len(adaptive.changes)
    assert logs["float32_layers"][0] == 1 and logs["float32_layers"][-1] == 2
    assert model.optimizer is optimizer
    pytest.importorskip("matplotlib")
    adaptive.plot(tmp_path / "changes.png")
    assert (tmp_path / "changes.png").stat().st_size > 1000


def test_a_clean_run_changes_nothing():
    model = mp.convert(model_with(clean), dry_run=False)
    adaptive = mp.AdaptivePrecision()
    logs = fit(model, adaptive, epochs=3)
    assert adaptive.changes == []
    assert logs["precision_changes"] == [0, 0, 0]
    with pytest.raises(ValueError, match="no layer changed"):
        adaptive.plot("nowhere.png")


class Times(layers.Layer):
    """Multiplies by a number that the test changes, and back."""

    def build(self, shape):
        self.factor = self.add_weight(
            shape=(), initializer="ones", trainable=False, autocast=False
        )

    def call(self, x):
        return x * ops.cast(self.factor, x.dtype)


class Factors(keras.callbacks.Callback):
    """Sets the factor for each epoch."""

    def __init__(self, layer, factors):
        super().__init__()
        self.layer, self.factors, self.epoch = layer, factors, None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        if self.model is not None:
            self.layer.factor.assign(self.factors[epoch])


def times_model(optimizer):
    times = Times(name="times")
    model = keras.Sequential([keras.Input((8,)), times, layers.Dense(4, "softmax")])
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return mp.convert(model, dry_run=False), times


def test_what_calms_down_comes_back(caplog):
    model, times = times_model(keras.optimizers.SGD(1e-6))
    factors = Factors(times, [1e6] * 2 + [1.0] * 10)
    adaptive = mp.AdaptivePrecision(patience=2, calm_epochs=3)
    with caplog.at_level(logging.WARNING, "keras_mixprec"):
        fit(model, adaptive, epochs=12, callbacks=[factors])
    assert "to mixed_float16 (calm epochs in a row: 3)" in caplog.text
    assert [(c.epoch, c.path, c.after) for c in adaptive.changes] == [
        (1, "times", "float32"),
        (4, "times", "mixed_float16"),
    ]
    assert settled(adaptive, 12)


def test_changes_keep_the_optimizers_state():
    """Out of half precision, which leaves all of the model in float32, and back."""
    model, times = times_model(keras.optimizers.Adam(1e-6))
    adaptive, seen = mp.AdaptivePrecision(patience=1, calm_epochs=1), []
    plain = adaptive._carry_out

    def watched(plan, changes):
        before = snapshot(model.optimizer, model)
        plain(plan, changes)
        if changes:
            seen.append((before, snapshot(model.optimizer, model)))

    adaptive._carry_out = watched
    factors = Factors(times, [1.0, 1e6, *[1.0] * 7])
    fit(model, adaptive, epochs=9, callbacks=[factors])
    assert [c.epoch for c in adaptive.changes] == [1, 2]
    assert len(seen) == 2
    for before, after in seen:
        assert_slots_are_used(before)
        assert_same_bits(before, after)


def test_the_step_is_made_anew_where_a_change_is_listed_and_nowhere_else():
    model, times = times_model(keras.optimizers.SGD(1e-6))
    factors = Factors(times, [1.0, 1e6, *[1.0] * 7])
    plain, made, twins = model.make_train_function, [], []

    def noted(force=False):
        if force:  # The twin that measures, made when it is first needed.
            twins.append(factors.epoch)
        elif model.train_function is None:
            made.append(factors.epoch)
        return plain(force)

    model.make_train_function = noted
    adaptive = mp.AdaptivePrecision(patience=1, calm_epochs=1)
    fit(model, adaptive, epochs=9, callbacks=[factors])
    assert [c.epoch for c in adaptive.changes] == [1, 2]
    # By `fit` itself, then after the epochs of the changes.
    assert made == [None, 1, 2]
    assert twins == [0, 2, 3]


def test_an_overflow_in_an_unseen_batch_is_hunted_down():
    model, times = times_model(keras.optimizers.SGD(1e-6))
    factors = Factors(times, [1e3] * 6)
    x, _ = inputs(128)
    x[32:96] *= 100  # Never in the first batch.
    adaptive = mp.AdaptivePrecision(patience=2)
    fit(model, adaptive, epochs=6, x=x, callbacks=[factors])
    assert [(c.epoch, c.path) for c in adaptive.changes] == [(1, "times")]


def test_the_search_for_a_loss_scale_is_no_trouble():
    model = model_with(clean)
    model.compile(
        mp.LossScaleOptimizer("adam", initial_scale=2.0**24),
        "sparse_categorical_crossentropy",
    )
    mp.convert(model, dry_run=False)
    adaptive = mp.AdaptivePrecision(patience=1, max_overflow_share=0.9)
    fit(model, adaptive, epochs=4, batch_size=8)
    assert model.optimizer.overflow_count > 1
    assert adaptive.changes == []


@pytest.mark.parametrize(
    "fallback", [pytest.param("mixed_bfloat16", marks=SLOW_ON_JAX), "auto"]
)
def test_bfloat16_where_the_hardware_has_it(fallback, monkeypatch):
    module = "keras_mixprec.callbacks.adaptive.has_bfloat16"
    monkeypatch.setattr(module, lambda: True)
    model = mp.convert(model_with(masked_mean), dry_run=False)
    adaptive = mp.AdaptivePrecision(patience=1, calm_epochs=9, fallback=fallback)
    logs = fit(model, adaptive, epochs=3)
    assert [(c.path, c.after) for c in adaptive.changes] == [
        ("fault", "mixed_bfloat16")
    ]
    assert model.get_layer("fault").compute_dtype == "bfloat16"
    assert np.isfinite(logs["loss"][1:]).all()
    monkeypatch.setattr(module, lambda: False)
    assert adaptive._fallback("mixed_float16") == (
        "float32" if fallback == "auto" else "mixed_bfloat16"
    )
    assert adaptive._fallback("mixed_bfloat16") == "float32"


def test_hardware_with_bfloat16(monkeypatch):
    for accelerator, expected in (
        (("gpu", (8, 0)), True),
        (("gpu", (7, 5)), False),
        (("tpu", None), True),
    ):
        monkeypatch.setattr(hardware.engine, "accelerator", lambda a=accelerator: a)
        assert hardware.has_bfloat16() is expected


def test_spans_of_the_picture():
    def change(epoch, before, after):
        return PrecisionChange(epoch, "a", before, after, "")

    changes = [change(1, "half", "float32"), change(4, "float32", "half")]
    assert spans(changes, 8) == [
        (0, 2, "half"),
        (2, 5, "float32"),
        (5, 8, "half"),
    ]


def test_a_model_in_half_for_a_squaring_layer_is_not_overflow():
    """Squares that end as inf inside a quotient give 0, not an overflow."""
    model = mp.convert(model_with(squaring), dry_run=False)
    adaptive = mp.AdaptivePrecision(patience=1)
    fit(model, adaptive, epochs=2)
    assert adaptive.changes == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"patience": 0}, "Received: patience=0"),
        ({"calm_epochs": 0}, "Received: calm_epochs=0"),
        ({"headroom": 0.5}, "Received: headroom=0.5"),
        ({"max_overflow_share": 2}, "Received: max_overflow_share=2"),
        ({"fallback": "float64"}, "Received: fallback='float64'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mp.AdaptivePrecision(**arguments)


def test_one_of_several_replicas_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "sees_whole_loss", lambda model: False)
    model = model_with(clean)
    with pytest.raises(ValueError, match="must see the whole batch.*calibrate"):
        model.fit(*inputs(8), verbose=0, callbacks=[mp.AdaptivePrecision()])
