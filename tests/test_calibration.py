"""`calibrate`: faults end in float32, nothing else does, and tolerances are kept."""

import itertools
import re

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from keras.initializers import RandomNormal
from planted import FAULTS
from planted import TinyEpsilon
from planted import TinyEpsilonBackward
from planted import clean
from planted import dense
from planted import epsilon
from planted import inputs
from planted import model_with
from planted import squaring
from planted import two_faults
from support import SLOW_ON_JAX
from support import assert_same_bits
from support import snapshot

import keras_mixprec as mp
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precisions import precisions_of
from keras_mixprec.precisions import preserved
from keras_mixprec.search import Search
from keras_mixprec.trials import Trials

FEW = {"batch_size": 32, "batches": 2, "verbose": 0}
NOT_OURS = ("input", "output layer")
# Where there is nothing to compile, these take no time.
COMPILES = [] if keras.backend.backend() == "torch" else [pytest.mark.slow]


def calibrated(model, x, y=None, **arguments):
    return mp.calibrate(model, x, y, **{**FEW, **arguments})


def moved(plan):
    return [r.path for r in plan if r.policy == "float32" and r.reason not in NOT_OURS]


def unseen_error(model, plan):
    mp.convert(model, plan=plan)
    return mp.compare_precision(model, inputs(512, seed=9)[0]).relative_error


def errors_of(model, data, kept):
    """Set of paths in float32 -> the error of the outputs."""
    errors = {}
    for paths in kept:
        mp.convert(mp.to_float32(model), keep_float32=list(paths))
        errors[paths] = mp.compare_precision(model, data).relative_error
    mp.to_float32(model)
    return errors


@pytest.mark.parametrize("fault", [pytest.param(f, marks=COMPILES) for f in FAULTS])
def test_a_planted_fault_ends_in_float32_and_nothing_else_does(fault):
    model, (x, y) = model_with(fault), inputs()
    plan = calibrated(model, x, y, tolerance=0.01)
    assert moved(plan) == ["fault"]
    assert unseen_error(model, plan) < 0.01
    logs = model.fit(x, y, verbose=0).history
    # The gradient of log(x) near 0 has no bound: one step in eight may be too large.
    assert model.optimizer.overflow_count <= (fault is epsilon)
    assert np.isfinite(logs["loss"]).all()


def test_of_two_faults_both_move_and_nothing_else_does():
    model, (x, y) = model_with(two_faults), inputs()
    plan = calibrated(model, x, y, tolerance=0.01)
    assert moved(plan) == ["squares", "mean"]
    assert unseen_error(model, plan) < 0.01


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_float16", marks=SLOW_ON_JAX), "mixed_bfloat16"]
)
def test_a_clean_model_ends_fully_in_half(policy):
    model, (x, y) = model_with(clean), inputs()
    plan = calibrated(model, x, y, policy=policy)
    assert moved(plan) == []
    assert plan.advice == []
    tolerance = {"mixed_float16": 0.01, "mixed_bfloat16": 0.08}[policy]
    assert unseen_error(model, plan) < tolerance


@pytest.mark.parametrize(
    "tolerance", [pytest.param(t, marks=COMPILES) for t in (3e-4, 2e-4)]
)
def test_the_tolerance_asked_for_is_the_tolerance_measured(tolerance):
    """Below what all layers in half make: some have to go, not all."""
    model, (x, y) = model_with(clean), inputs()
    everything = unseen_error(model, mp.plan(model))
    mp.to_float32(model)
    plan = calibrated(model, x, y, tolerance=tolerance, batch_size=64, batches=4)
    assert everything > tolerance
    assert 0 < unseen_error(model, plan) < tolerance
    assert moved(plan)


def test_measurements_and_loss_scale():
    model, (x, y) = model_with(clean), inputs()
    plan = calibrated(model, x, y)
    row = plan["dense"].measured
    outputs = keras.Model(model.inputs, model.layers[0].output)
    seen = x[np.random.default_rng(0).permutation(len(x))[:32]]
    largest = np.abs(outputs.predict(seen, verbose=0)).max()
    assert row["max_abs"] == pytest.approx(largest, rel=1e-5)
    assert row["headroom"] == pytest.approx(65504 / largest, rel=1e-5)
    assert row["activation_bytes"] == 16 * 4
    assert 0 < row["own_error"] < 2e-3
    assert row["underflow_share"] == 0
    # A power of two; the largest gradient below the limit with 8 to 16 times room.
    assert np.log2(plan.initial_scale) % 1 == 0
    largest = max(r.measured.get("gradient_max_abs", 0.0) for r in plan)
    assert largest <= 65504 / 8
    assert plan.initial_scale > 1
    assert calibrated(model, x, y, policy="mixed_bfloat16").initial_scale == 1


def test_underflow_and_the_loss_scale_against_numpy():
    """The loss is linear in the outputs, and its targets are the gradients."""
    hidden, output = dense(16, name="hidden"), dense(4, name="output")
    model = keras.Sequential([keras.Input((8,)), hidden, output])
    model.compile("sgd", lambda t, y: ops.sum(t * y, axis=-1))
    x, random = inputs(64)[0], np.random.default_rng(1)
    targets = 10 ** random.uniform(-15, 0, (64, 4)) * random.choice([-1, 0, 1], (64, 4))
    targets = targets.astype("float32")
    plan = calibrated(model, x, targets)
    largest = 0.0
    for rows in np.random.default_rng(0).permutation(64).reshape(2, 32):
        given, back = x[rows], targets[rows] / 32
        kernel, bias = hidden.get_weights()
        inside = back @ output.get_weights()[0].T
        of_weights = [given.T @ inside, inside.sum(0), back.sum(0)]
        of_weights.append((given @ kernel + bias).T @ back)
        found = [np.abs(g).max() for g in (back, inside, *of_weights)]
        largest = max(largest, *found)
    assert 65504 / 16 < largest * plan.initial_scale <= 65504 / 8
    # Ranges are those of the batches that are searched on: here the first.
    scaled = targets[np.random.default_rng(0).permutation(64)[:32]] / 32
    scaled = scaled[scaled != 0] * plan.initial_scale
    share = np.mean(scaled.astype("float16") == 0)
    assert 0.1 < share < 0.9
    assert plan["output"].measured["underflow_share"] == share
    assert plan["output"].measured["gradient_max_abs"] == np.abs(scaled).max()


def in_the_last_batch(x, change):
    """Data of which the batch that is not searched on alone is changed."""
    rows = np.random.default_rng(0).permutation(len(x))[32:64]
    x = x.copy()
    x[rows] = change(x[rows])
    return x


def test_the_loss_scale_leaves_room_for_the_last_batch_too():
    model, (x, _) = keras.Sequential([keras.Input((8,)), dense(4)]), inputs()
    model.compile("sgd", "mse")
    larger = in_the_last_batch(x, lambda rows: 64 * rows)
    plans = [calibrated(model, data, 0 * data[:, :4]) for data in (x, larger)]
    # Gradients of the weights grow with the square.
    assert plans[1].initial_scale <= plans[0].initial_scale / 2**10


class Coarse(layers.Dense):
    """A matrix product of which float16 keeps 5 bits; small ones weigh as much."""

    def __init__(self, units, weight=1.0, **arguments):
        super().__init__(units, **arguments)
        self.weight = weight / units**0.5

    def call(self, x):
        return (super().call(x) + 64 - 64) * self.weight


class Magnitude(layers.Layer):
    """sqrt(x**2 + 1e-8): no gradient in float16 where x is 0."""

    def call(self, x):
        return ops.sqrt(ops.square(x) + 1e-8)


def test_gradients_damaged_in_the_last_batch_alone_are_seen():
    middle = [dense(8, kernel_initializer="identity"), Magnitude(name="fault")]
    model, (x, y) = model_with(lambda: middle), inputs()
    x = np.sign(x) + x
    assert moved(calibrated(model, x, y)) == []
    zeros = in_the_last_batch(x, np.zeros_like)
    assert moved(calibrated(model, zeros, y)) == ["fault"]


def test_outputs_off_in_the_last_batch_alone_are_seen():
    model = keras.Sequential(
        [keras.Input((8,)), Coarse(8, name="fault"), layers.Dense(4)]
    )
    # Right gradients: those of the biases, which do not depend on x, outweigh the rest.
    model.compile("sgd", lambda t, y: ops.sum(t * y, axis=-1))
    x, y = inputs()[0], np.ones((256, 4), "float32")
    assert moved(calibrated(model, x, y, tolerance=0.1)) == []
    small = in_the_last_batch(x, lambda rows: rows / 64)
    assert moved(calibrated(model, small, y, tolerance=0.1)) == ["fault"]


def test_the_plan_survives_json_and_sets_the_scale():
    model, (x, y) = model_with(squaring), inputs()
    plan = calibrated(model, x, y)
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    assert f"initial loss scale: {plan.initial_scale:g}" in str(plan)
    mp.convert(model, plan=plan)
    assert model.optimizer.initial_scale == plan.initial_scale


def test_the_same_seed_gives_the_same_plan():
    x, y = inputs()
    plans = []
    for _ in range(2):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        plans.append(calibrated(model_with(squaring), x, y, seed=3).to_json())
    assert plans[0] == plans[1]


def test_the_model_is_left_as_it_was():
    model, (x, y) = model_with(squaring), inputs(64)
    model.fit(x, y, verbose=0)
    before, function = snapshot(model, model.optimizer), model.train_function
    precisions = precisions_of(model)
    calibrated(model, x, y)
    assert precisions_of(model) == precisions
    assert model.train_function is function
    assert_same_bits(before, snapshot(model, model.optimizer))


def test_calibrating_again_begins_anew():
    model, (x, y) = model_with(squaring), inputs()
    mp.convert(model, plan=calibrated(model, x, y))
    assert model.get_layer("fault").dtype_policy.name == "float32"
    fault = model.get_layer("fault")
    assert moved(calibrated(model, x / 1000, y)) == []
    assert moved(calibrated(model, x, y)) == ["fault"]
    assert fault.dtype_policy.name == "float32"


def test_the_users_layers_and_the_rules_stay():
    model, (x, y) = model_with(clean), inputs()
    plan = calibrated(model, x, y, keep_float32=["conv1d"])
    assert moved(plan) == ["conv1d"]
    assert plan["conv1d"].reason == "user"


def test_without_targets_gradients_are_still_checked():
    model = keras.Sequential(
        [keras.Input((8,)), TinyEpsilonBackward(name="fault"), layers.Dense(2)]
    )
    # The fault's own weights would feel it; here what is before it does.
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8), *model.layers], name="net"
    )
    plan = calibrated(model, inputs()[0])
    assert moved(plan) == ["fault"]
    assert "gradients" in plan["fault"].reason


def test_an_operation_that_is_no_layer_is_met_by_what_feeds_it():
    x = keras.Input((8,))
    y = layers.Dense(8, kernel_initializer=RandomNormal(0, 200))(x)
    y = ops.square(y) / 1e6
    model = keras.Model(x, layers.Dense(2)(y))
    plan = calibrated(model, inputs()[0])
    assert "dense" in moved(plan)
    assert unseen_error(model, plan) < 0.01


def test_an_rnn_goes_with_its_cell():
    x = np.random.default_rng(0).normal(size=(64, 6, 4)).astype("float32")
    model = keras.Sequential(
        [keras.Input((6, 4)), layers.SimpleRNN(8, name="rnn"), layers.Dense(2)]
    )
    plan = calibrated(model, x, tolerance=1e-9)
    assert plan["rnn"].policy == "float32"
    assert {r.policy for r in plan if r.path.startswith("rnn")} == {"float32"}
    assert plan.advice == []


@pytest.mark.parametrize(
    "search, kept", [("fewest", "worst"), ("memory", "small"), ("speed", "light")]
)
def test_search_weighs_layers_by_what_they_cost(search, kept):
    """One errs more than two others: with few activations, and few multiply-adds."""
    x = keras.Input((8,))
    # 65536 multiply-adds and 256 values; 4096 and 16; 512 and 256.
    worst = Coarse(256, weight=1.4, name="worst")(layers.Dense(256)(x))
    small = Coarse(16, name="small")(layers.Dense(256)(x))
    light = Coarse(256, name="light")(layers.Dense(2)(x))
    outputs = layers.Dense(4)(layers.Concatenate()([worst, small, light]))
    model = keras.Model(x, outputs)
    data, _ = inputs()
    errors = errors_of(model, data, [(), ("worst",), ("small",), ("light",)])
    everything = errors.pop(())
    # Any of them is enough: so the tolerance does not choose.
    assert max(errors.values()) < 0.9 * everything
    # But most would be gained by that one.
    assert errors["worst",] < 0.95 * min(errors["small",], errors["light",])
    tolerance = 0.95 * everything / 0.75
    # On all the data, as the errors above.
    all_of_it = {"batch_size": len(data), "batches": 1, "tolerance": tolerance}
    plan = calibrated(model, data, search=search, **all_of_it)
    assert moved(plan) == [kept]


def test_what_a_later_layer_makes_needless_is_given_back():
    """A cheap layer goes first; then one that costs more, and is enough alone."""
    x = keras.Input((8,))
    cheap = Coarse(16, weight=0.6, name="cheap")(layers.Dense(256)(x))
    needed = Coarse(256, weight=1.4, name="needed")(layers.Dense(256)(x))
    outputs = layers.Dense(4)(layers.Concatenate()([cheap, needed]))
    model, (data, _) = keras.Model(x, outputs), inputs()
    errors = errors_of(model, data, [("needed",), ("cheap",)])
    assert 1.5 * errors["needed",] < errors["cheap",]
    plan = calibrated(
        model,
        data,
        search="memory",
        tolerance=1.2 * errors["needed",] / 0.75,
        batch_size=len(data),
        batches=1,
    )
    assert moved(plan) == ["needed"]


@pytest.mark.parametrize("fewest", [1, 2, 3])
def test_no_smaller_set_of_layers_would_do(fewest):
    """All sixteen sets are measured; the tolerance lies between two sizes."""
    names = "abcd"
    hidden = [
        Coarse(16, 4 / size, name=name, kernel_initializer=RandomNormal(0, size / 4))
        for name, size in zip(names, (2.0, 1.0, 3.0, 1.5), strict=True)
    ]
    model = keras.Sequential([keras.Input((8,)), *hidden, layers.Dense(4)])
    data, _ = inputs()
    sets = [c for n in range(5) for c in itertools.combinations(names, n)]
    errors = errors_of(model, data, sets)
    best = [min(e for s, e in errors.items() if len(s) == n) for n in range(5)]
    target = (best[fewest - 1] * best[fewest]) ** 0.5
    plan = calibrated(
        model, data, tolerance=target / 0.75, batch_size=len(data), batches=1
    )
    assert best[fewest] < 0.95 * target
    assert len(moved(plan)) == fewest
    assert errors[tuple(sorted(moved(plan)))] <= target


def test_no_time_at_all_is_still_within_the_tolerance():
    model, (x, y) = model_with(squaring), inputs()
    plan = calibrated(model, x, y, max_seconds=1e-9)
    assert plan["fault"].policy == "float32"
    assert "time ran out" in plan.advice[0]
    assert unseen_error(model, plan) < 0.01


def in_series(fault, count=8):
    pairs = ((dense(16), fault(name=f"fault{i}")) for i in range(count))
    return [layer for pair in pairs for layer in pair]


def noted(monkeypatch, name):
    """The plans that a method of `Trials` is called with."""
    plain, plans = getattr(Trials, name), []

    def watched(self, plan, batches):
        plans.append(plan)
        return plain(self, plan, batches)

    monkeypatch.setattr(Trials, name, watched)
    return plans


@pytest.mark.parametrize("seconds", [pytest.param(300, marks=COMPILES), 1e-9])
def test_out_of_time_damaged_gradients_end_after_a_logarithm_of_rounds(
    seconds, monkeypatch
):
    model = model_with(lambda: in_series(TinyEpsilonBackward))
    rounds = noted(monkeypatch, "gradient_errors")
    plan = calibrated(model, *inputs(), batches=1, max_seconds=seconds)
    assert {f"fault{i}" for i in range(8)} <= set(moved(plan))
    if seconds == 1e-9:
        in_half = sum(r.policy == "mixed_float16" for r in plan) + len(moved(plan))
        assert len(rounds) <= np.log2(in_half) + 2
        assert len(moved(plan)) < in_half
    else:
        assert len(moved(plan)) == 8 and len(rounds) > 8


def test_out_of_time_infinite_outputs_end_after_a_logarithm_of_rounds(monkeypatch):
    model, (x, y) = model_with(lambda: in_series(TinyEpsilon)), inputs(32)
    plan = mp.plan(model)  # Without a batch, on which the dry run would find them.
    half = {row.path: row.policy for row in plan if row.policy == "mixed_float16"}
    with preserved(model):
        trials, rounds = Trials(model, [(x, y)]), noted(monkeypatch, "own_errors")
        search = Search(trials, plan, half, 0.01, lambda row: 1.0, deadline=0.0)
        assert search.run([0]) < 0.01
    assert {f"fault{i}" for i in range(8)} <= set(moved(plan))
    assert len(rounds) <= np.log2(len(half)) + 1


def test_progress_is_a_share_of_the_time(capsys):
    model, (x, _) = model_with(squaring), inputs(32)
    mp.calibrate(model, x, batches=1, max_seconds=500)
    shown = capsys.readouterr().out
    first, *_, last = re.findall(r"(\d+)/(\w+)", shown)
    assert first == ("0", "500")
    assert int(last[0]) == int(last[1]) < 500  # Full, with the time that it took.
    # The input and the output; then the fault.
    assert re.findall(r"error: \S+ - float32 layers: (\d)", shown)[-1] == "3"
    mp.calibrate(model, x, batches=1, verbose=0)
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policy": "float32"}, "Received: policy='float32'"),
        ({"search": "best"}, "Received: search='best'"),
        ({"tolerance": 0.0}, "Received: tolerance=0.0"),
        ({"batches": 0}, "Received: batches=0"),
        ({"max_seconds": -1}, "Received: max_seconds=-1"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrated(model_with(clean), inputs(32)[0], **arguments)


def test_a_model_that_is_not_finite_in_float32_is_refused():
    model, (x, _) = model_with(clean), inputs(32)
    model.layers[0].kernel.assign(np.full((8, 16), np.nan))
    with pytest.raises(ValueError, match="finite in float32"):
        calibrated(model, x)
