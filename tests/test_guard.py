"""`LossScaleGuard`: every violation is seen, at its step, and explained."""

import logging
import warnings

import keras
import numpy as np
import pytest

import keras_mixprec as mp
from keras_mixprec.callbacks.guard import LossScaleError
from keras_mixprec.callbacks.guard import LossScaleGuard


def model_with(rule=None, compiled=True, **compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.Dense(1, name="last"),
        ],
        name="net",
    )
    if compiled:
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1e-3), **(rule or {}))
        model.compile(optimizer, "mse", **compile_arguments)
    return model


def drive(model, bad, guard, epochs=1, overflowing=None):
    """Call the guard as `fit` does; return the number of steps that were run.

    Each step hands the optimizer a gradient of zeros, or, where `bad` says so, of NaN
    for the `overflowing` variables (all by default). `bad` is one epoch's list, or
    a list of such lists.
    """
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.scale_loss(1.0)
    good = [keras.ops.zeros(v.shape) for v in variables]
    nan = [keras.ops.full(v.shape, np.nan) for v in variables]
    chosen = range(len(variables)) if overflowing is None else overflowing
    worse = [nan[i] if i in chosen else g for i, g in enumerate(good)]
    guard.set_model(model)
    guard.on_train_begin()
    rows = bad if isinstance(bad[0], list) else [bad] * epochs
    for epoch, row in enumerate(rows):
        guard.on_epoch_begin(epoch)
        for batch, is_bad in enumerate(row):
            guard.on_train_batch_begin(batch)
            optimizer.apply(worse if is_bad else good, variables)
            guard.on_train_batch_end(batch)
        guard.on_epoch_end(epoch, {})
    return len(bad) * epochs


def fit(model, bad, guard, epochs=1):
    """Train on one-sample batches, some of them NaN; return the number of steps."""
    x = np.ones((len(bad), 4), "float32")
    x[np.array(bad, bool)] = np.nan
    y = np.ones((len(bad), 1), "float32")
    with warnings.catch_warnings():
        # An epoch that was skipped whole warns by itself.
        warnings.filterwarnings("ignore", message="Epoch .* steps overflowed")
        model.fit(
            *(x, y),
            batch_size=1,
            shuffle=False,
            epochs=epochs,
            verbose=0,
            callbacks=[guard],
        )
    return len(bad) * epochs


def stopped(model, bad, guard, run=drive, **arguments):
    """Return the error's text and the number of steps that were run before it."""
    with pytest.raises(LossScaleError) as caught:
        run(model, bad, guard, **arguments)
    optimizer = model.optimizer
    applied = int(keras.ops.convert_to_numpy(optimizer.inner_optimizer.iterations))
    return str(caught.value), applied + optimizer.overflow_count


# -- steps in a row -----------------------------------------------------------------


@pytest.mark.parametrize("good_before", [0, 1, 2, 3, 5, 7])
def test_a_row_is_seen_at_exactly_its_step(good_before):
    text, steps = stopped(model_with(), [0] * good_before + [1] * 20, LossScaleGuard(3))
    assert steps == good_before + 3
    assert "3 steps in a row were skipped" in text


def test_a_row_after_broken_rows_is_seen_at_its_step():
    bad = [1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1]
    text, steps = stopped(model_with(), bad, LossScaleGuard(3))
    assert steps == 12


def test_a_row_that_crosses_epochs_is_seen():
    _, steps = stopped(model_with(), [1, 0, 0, 0, 0, 1], LossScaleGuard(2), epochs=3)
    assert steps == 7


def test_shorter_rows_are_allowed():
    bad = [1, 1, 0] * 6
    assert drive(model_with(), bad, LossScaleGuard(3, max_overflow_share=None)) == 18


def test_the_default_allows_a_new_scale_to_settle():
    # From 2**15 to 2**4: what calibrated float16 models need.
    assert drive(model_with(), [1] * 11 + [0] * 4, LossScaleGuard()) == 15


def test_a_row_inside_an_epoch_is_allowed_without_a_limit():
    bad = [1] * 8 + [0] * 2
    assert (
        drive(model_with(), bad, LossScaleGuard(max_consecutive_overflows=None)) == 10
    )


def test_fit_stops_at_exactly_the_step():
    bad = [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1]
    text, steps = stopped(model_with(), bad, LossScaleGuard(3), run=fit)
    assert steps == 9
    assert "in all of them the loss itself was not finite already" in text


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras runs one step per execution there"
)
def test_fit_stops_at_the_end_of_an_execution_of_several_steps():
    model = model_with(steps_per_execution=4)
    text, steps = stopped(model, [1] * 16, LossScaleGuard(3), run=fit)
    assert steps == 4
    assert "4 steps in a row were skipped" in text


def test_healthy_training_is_read_once_every_limit_batches(monkeypatch):
    reads = []
    own = mp.LossScaleOptimizer.consecutive_overflows.fget
    counted = property(lambda self: reads.append(1) or own(self))
    monkeypatch.setattr(mp.LossScaleOptimizer, "consecutive_overflows", counted)
    model = model_with()
    drive(model, [0] * 40, LossScaleGuard(20))
    # At the beginning, twice at batch 20 and three times at the end of the epoch.
    assert len(reads) <= 8


def test_no_hook_after_a_batch_so_that_dispatch_stays_asynchronous():
    guard = LossScaleGuard()
    callbacks = keras.callbacks.CallbackList([guard], model=model_with())
    plain = keras.callbacks.CallbackList([], model=model_with())
    assert callbacks._async_train == plain._async_train


# -- the scale ----------------------------------------------------------------------


def test_overflows_at_the_optimizers_minimum():
    model = model_with({"initial_scale": 4.0, "min_scale": 1.0})
    text, steps = stopped(model, [1, 0] * 5, LossScaleGuard(max_overflow_share=None))
    assert steps == 10
    assert "steps overflow although the scale is at the optimizer's minimum" in text
    assert "The loss scale is 1; 5 steps were skipped so far." in text


def test_sitting_at_the_minimum_without_overflow_is_fine():
    model = model_with({"initial_scale": 1.0, "min_scale": 1.0})
    assert drive(model, [0] * 5, LossScaleGuard()) == 5


def test_a_fixed_scale_is_not_at_its_minimum():
    rule = {"growth_factor": 1.0, "backoff_factor": 1.0}
    model = model_with({"initial_scale": 1.0, "min_scale": 1.0, **rule})
    assert drive(model, [0, 1, 0, 0], LossScaleGuard(max_overflow_share=None)) == 4


def test_below_the_guards_own_minimum():
    model = model_with({"initial_scale": 8.0})
    guard = LossScaleGuard(3, min_scale=2.0)
    text, steps = stopped(model, [1, 0, 1, 0, 0, 1, 0, 0, 0, 0], guard)
    assert "the scale fell below min_scale=2" in text
    assert "The loss scale is 1;" in text
    assert steps == 8, "looked at after 3, 5 and 8 batches, low since the sixth"


# -- thrashing ----------------------------------------------------------------------


def test_growth_that_is_undone_each_time():
    model = model_with({"initial_scale": 64.0, "dynamic_growth_steps": 2})
    text, _ = stopped(model, [0, 0, 1] * 6, LossScaleGuard())
    assert "the scale thrashes" in text
    assert "cost 6 steps, 33% of them (allowed: 5%)" in text
    assert "`dynamic_growth_steps=2000` (it is 2)" in text
    assert "`max_scale=64`" in text


def test_growth_that_is_undone_over_several_short_epochs():
    model = model_with({"initial_scale": 64.0, "dynamic_growth_steps": 2})
    text, steps = stopped(model, [0, 0, 1], LossScaleGuard(), epochs=10)
    assert steps == 12, "four overflows make a pattern"


def test_growth_that_is_undone_only_after_the_scale_has_grown():
    model = model_with({"initial_scale": 64.0, "dynamic_growth_steps": 2})
    text, steps = stopped(model, [[0] * 6, [0, 0, 1] * 6, [0]], LossScaleGuard())
    assert steps == 24
    assert "cost 6 steps, 33% of them" in text and "`max_scale=512`" in text


@pytest.mark.parametrize(
    ("share", "bad"),
    [
        (0.05, [1] * 8 + [0] * 20),  # falls to where it belongs
        (0.5, [0, 0, 1] * 6),  # a third is allowed
        (None, [0, 0, 1] * 6),
        (0.05, [0, 0, 1] * 3),  # three overflows are no pattern
        (0.05, [0] * 18),  # grows freely
    ],
)
def test_what_is_not_thrashing(share, bad):
    model = model_with({"initial_scale": 64.0, "dynamic_growth_steps": 2})
    guard = LossScaleGuard(max_overflow_share=share)
    assert drive(model, bad, guard) == len(bad)


def test_settling_first_does_not_count_against_steady_growth():
    model = model_with({"initial_scale": 2.0**15, "dynamic_growth_steps": 10})
    guard = LossScaleGuard()
    assert drive(model, [1] * 8 + [0] * 4, guard, epochs=1) == 12
    assert drive(model, [0] * 12, guard, epochs=4) == 48


# -- what is said -------------------------------------------------------------------


def test_the_error_names_layers_and_three_remedies():
    text, _ = stopped(model_with(), [1] * 9, LossScaleGuard(2))
    assert text.startswith("Model 'net', optimizer 'loss_scale_optimizer")
    assert "2 steps overflowed since training began; the loss itself was finite" in text
    assert "began to overflow, nearest the loss first, in 'last' (2)." in text
    assert "(1) look for NaN" in text
    assert "(2) lower the learning rate" in text
    assert (
        "(3) keep that layer exact: `mp.convert(model, keep_float32=['last'])`" in text
    )


def test_layers_after_the_one_where_the_overflow_starts_are_not_named():
    # The variables of 'first' alone.
    text, _ = stopped(model_with(), [1] * 9, LossScaleGuard(4), overflowing=(0, 1))
    assert "nearest the loss first, in 'first' (4)." in text
    assert "keep_float32=['first']" in text


def test_layers_of_nested_models_have_the_paths_of_the_plan():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="deep")])
    inner.name = "inner"
    model = keras.Sequential([keras.Input((4,)), inner])
    model.compile(mp.LossScaleOptimizer("sgd"), "mse")
    text, _ = stopped(model, [1] * 9, LossScaleGuard(2))
    assert "nearest the loss first, in 'inner/deep' (2)." in text


def test_counts_before_this_training_do_not_count():
    model = model_with()
    drive(model, [1, 0], LossScaleGuard(5))
    text, _ = stopped(model, [1] * 9, LossScaleGuard(2))
    assert "'last' (2)" in text
    assert "3 steps were skipped so far" in text


def test_warn_says_it_once_and_lets_the_run_go_on():
    model = model_with()
    with pytest.warns(UserWarning, match="3 steps in a row were skipped") as caught:
        drive(model, [1] * 12, LossScaleGuard(3, on_violation="warn"))
    assert model.optimizer.overflow_count == 12
    assert len([w for w in caught if "in a row" in str(w.message)]) == 1


# -- models it cannot guard ---------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False])
def test_without_our_optimizer_it_says_so_once(caplog, wrapped):
    model = model_with(compiled=False)
    optimizer = keras.optimizers.SGD()
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse")
    with caplog.at_level(logging.WARNING, "keras_mixprec"):
        assert fit(model, [0] * 4, LossScaleGuard(1), epochs=2) == 8
    (line,) = [r.getMessage() for r in caplog.records if r.name == "keras_mixprec"]
    assert "nothing to guard" in line and "'net'" in line


# -- arguments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_consecutive_overflows": 0}, "must be an integer >= 1 or None. Received"),
        ({"max_consecutive_overflows": 2.5}, "max_consecutive_overflows=2.5"),
        ({"min_scale": 0.0}, "`min_scale` must be a finite number > 0"),
        ({"min_scale": float("nan")}, "min_scale=nan"),
        ({"min_scale": "1"}, "min_scale='1'"),
        ({"max_overflow_share": 1.5}, r"a number in \[0, 1\] or None. Received"),
        ({"on_violation": "raise"}, "'stop' or 'warn'. Received: on_violation='raise'"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossScaleGuard(**arguments)
