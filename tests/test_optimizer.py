"""`LossScaleOptimizer` alone: exact updates, exact skips, counters, state, misuse."""

import keras
import numpy as np
import pytest
from keras import ops
from support import SCALING
from support import STATELESS
from support import assert_same_bits
from support import scaled_step
from support import snapshot
from support import tensors
from support import variables

import keras_mixprec as mp

BAD = [np.inf, -np.inf, np.nan]
START = [[[1.0, 2.0], [-3.0, 0.5]], [0.25, -0.0]]
RNG = np.random.default_rng(0)
GRADS = [[RNG.normal(size=(2, 2)), RNG.normal(size=2)] for _ in range(6)]

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.5),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True, use_ema=True),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, clipnorm=1.0),
    "lion": lambda: keras.optimizers.Lion(0.01, global_clipnorm=1.0),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "averaging": lambda: keras.optimizers.SGD(
        0.5, use_ema=True, ema_overwrite_frequency=3
    ),
    "schedule": lambda: keras.optimizers.RMSprop(
        keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    ),
}


@pytest.fixture(params=OPTIMIZERS, ids=str)
def inner(request):
    return OPTIMIZERS[request.param]


def test_scaling_changes_no_bit_of_an_update(inner):
    alone, wrapped = inner(), mp.LossScaleOptimizer(inner(), dynamic_growth_steps=2)
    plain, scaled = variables(*START), variables(*START)
    for grads in GRADS:
        alone.apply(tensors(*grads), plain)
        scaled_step(wrapped, grads, scaled)
    assert float(wrapped.loss_scale) == 2.0**18
    # Six updates on: a slot that differed would have moved the weights.
    pairs = zip(snapshot(plain).values(), snapshot(scaled).values(), strict=True)
    assert all(left.tobytes() == right.tobytes() for left, right in pairs)


@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_step_leaves_no_trace(inner, bad):
    optimizer, weights = mp.LossScaleOptimizer(inner()), variables(*START)
    for grads in GRADS[:3]:
        scaled_step(optimizer, grads, weights)
    before = snapshot(weights, optimizer)
    scaled_step(optimizer, [GRADS[3][0], [1.0, bad]], weights)
    assert_same_bits(before, snapshot(weights, optimizer), but=SCALING)
    assert float(optimizer.loss_scale) == 2.0**14
    assert (optimizer.overflow_count, optimizer.consecutive_overflows) == (1, 1)


@pytest.mark.parametrize("huge", [1e30, 2.0**49, -3e38])
def test_a_gradient_whose_squares_overflow_is_skipped_too(huge):
    inner = keras.optimizers.Adam(0.5, global_clipnorm=1.0)
    optimizer, weights = (
        mp.LossScaleOptimizer(inner, initial_scale=1.0),
        variables([1.0]),
    )
    optimizer.apply(tensors([huge]), weights)
    assert optimizer.overflow_count == 1
    assert ops.convert_to_numpy(weights[0]).tolist() == [1.0]
    optimizer.apply(tensors([2.0**47]), weights)
    assert optimizer.overflow_count == 1
    assert np.isfinite(ops.convert_to_numpy(weights[0])).all()


def test_unscaling_below_one_cannot_create_infinity():
    optimizer = mp.LossScaleOptimizer("sgd", initial_scale=2.0**-14)
    weights = variables([1.0])
    optimizer.apply(tensors([3e38]), weights)
    assert optimizer.overflow_count == 1
    assert ops.convert_to_numpy(weights[0]).tolist() == [1.0]


def test_500_bad_steps_then_a_clean_one():
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    weights = variables([1.0])
    bad = tensors([np.nan])
    for _ in range(500):
        optimizer.apply(bad, weights)
    assert float(optimizer.loss_scale) == 2.0**-14
    assert optimizer.consecutive_overflows == 500
    scaled_step(optimizer, [[1.0]], weights)
    assert ops.convert_to_numpy(weights[0]).tolist() == [0.5]
    assert (optimizer.overflow_count, optimizer.consecutive_overflows) == (500, 0)


def test_counts_overflows_per_variable():
    optimizer, weights = mp.LossScaleOptimizer("sgd"), variables(*START)
    names = ["kernel", "bias"]
    weights = [
        keras.Variable(np.asarray(v, "float32"), name=n)
        for v, n in zip(START, names, strict=True)
    ]
    good = np.ones((2, 2)), np.ones(2)
    scaled_step(optimizer, [good[0], [1.0, np.inf]], weights)
    scaled_step(optimizer, [good[0] * np.nan, [1.0, np.inf]], weights)
    scaled_step(optimizer, good, weights)
    assert optimizer.overflow_counts == {"kernel": 1, "bias": 2}
    assert optimizer.overflow_count == 2


def test_counts_land_on_the_right_variable_of_a_subset():
    optimizer, weights = mp.LossScaleOptimizer("sgd"), variables(*START, [3.0])
    optimizer.build(weights)
    optimizer.apply(tensors([np.inf], [1.0, 1.0]), [weights[2], weights[1]])
    counts = ops.convert_to_numpy(optimizer.variable_counters).tolist()
    assert counts == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_variables_that_share_a_path_are_counted_apart():
    optimizer = mp.LossScaleOptimizer("sgd")
    weights = [keras.Variable([1.0], name="kernel") for _ in range(3)]
    for bad in ([0, 1, 0], [0, 1, 1]):
        scaled_step(optimizer, [[np.nan] if b else [1.0] for b in bad], weights)
    assert optimizer.overflow_counts == {"kernel": 0, "kernel#2": 2, "kernel#3": 1}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_missing_gradients_are_finite():
    optimizer, weights = mp.LossScaleOptimizer("sgd"), variables([1.0], [1.0])
    optimizer.apply([None, *tensors([0.0])], weights)
    assert optimizer.overflow_count == 0
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None, None], weights)


def test_inner_optimizer_by_name_and_by_config():
    by_name = mp.LossScaleOptimizer("adam")
    config = keras.optimizers.serialize(by_name.inner_optimizer)
    by_config = mp.LossScaleOptimizer(config)
    assert type(by_name.inner_optimizer) is type(by_config.inner_optimizer)


def test_config_survives_a_round_trip_with_every_field():
    fields = {
        "initial_scale": 8.0,
        "dynamic_growth_steps": 3,
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        "min_scale": 2.0,
        "max_scale": 64.0,
        "hysteresis": 3,
        "consecutive_hysteresis": True,
        "name": "mine",
    }
    optimizer = mp.LossScaleOptimizer("lion", **fields)
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert again.rule == optimizer.rule
    assert again.get_config() == optimizer.get_config()
    assert {k: again.get_config()[k] for k in fields} == fields


@pytest.mark.parametrize("value", [mp.LossScaleOptimizer("sgd"), "keras"])
def test_rejects_an_optimizer_that_scales_already(value):
    if value == "keras":
        value = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    with pytest.raises(ValueError, match="already. Received: .*Pass its"):
        mp.LossScaleOptimizer(value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_scale": 8.0, "max_scale": 4.0},
        {"growth_factor": 0.5},
        {"backoff_factor": 0.0},
        {"hysteresis": 0},
        {"dynamic_growth_steps": 0},
    ],
)
def test_rejects_contradictory_arguments(arguments):
    with pytest.raises(ValueError, match="Received: "):
        mp.LossScaleOptimizer("sgd", **arguments)


def test_warns_that_the_inner_scale_is_dropped():
    with pytest.warns(UserWarning, match="`loss_scale_factor=100.*initial_scale"):
        mp.LossScaleOptimizer(keras.optimizers.SGD(loss_scale_factor=100.0))


def test_fixed_scale_still_skips():
    optimizer = mp.LossScaleOptimizer(
        "sgd", initial_scale=64.0, growth_factor=1.0, backoff_factor=1.0
    )
    weights = variables([1.0])
    scaled_step(optimizer, [[np.inf]], weights)
    assert float(optimizer.loss_scale) == 64.0
    assert ops.convert_to_numpy(weights[0]).tolist() == [1.0]


def test_scales_a_half_precision_loss_in_float32():
    loss = ops.convert_to_tensor(np.float16(100.0))
    scaled = mp.LossScaleOptimizer("sgd").scale_loss(loss)
    assert float(scaled) == 100.0 * 2**15


def test_the_tf_keras_way_unscales_once():
    optimizer, weights = (
        mp.LossScaleOptimizer(keras.optimizers.SGD(0.5)),
        variables([1.0]),
    )
    loss = optimizer.get_scaled_loss(ops.convert_to_tensor(np.float32(2.0)))
    assert float(loss) == 2.0 * 2**15
    assert float(optimizer.get_scaled_loss(lambda: 2.0)()) == 2.0 * 2**15
    grads = optimizer.get_unscaled_gradients([*tensors([2.0**15]), None])
    assert ops.convert_to_numpy(grads[0]).tolist() == [1.0]
    assert grads[1] is None
    optimizer.apply_gradients([(grads[0], weights[0])])
    assert ops.convert_to_numpy(weights[0]).tolist() == [0.5]
    scaled_step(optimizer, [[1.0]], weights)
    assert ops.convert_to_numpy(weights[0]).tolist() == [0.0]


def test_gradients_for_a_model_need_a_scaled_loss():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    grads = tensors([[1.0]], [1.0])
    before = snapshot(model)
    with pytest.raises(ValueError, match="has not scaled a loss.*Add .*scale_loss"):
        optimizer.apply(grads, model.trainable_variables)
    assert_same_bits(before, snapshot(model))
    optimizer.scale_loss(1.0)
    optimizer.apply(grads, model.trainable_variables)


def test_gradients_are_not_changed_in_place():
    optimizer, weights = mp.LossScaleOptimizer("sgd"), variables([1.0])
    grads = tensors([64.0])
    optimizer.apply(grads, weights)
    assert ops.convert_to_numpy(grads[0]).tolist() == [64.0]


@pytest.mark.skipif(not STATELESS, reason="TensorFlow variables are stateful")
def test_stateless_step_and_scale():
    optimizer, weights = (
        mp.LossScaleOptimizer(keras.optimizers.SGD(0.5)),
        variables([1.0]),
    )
    optimizer.build(weights)
    values = [ops.copy(v.value) for v in weights]
    state = [ops.copy(v.value) for v in optimizer.variables]
    for grad, scale in (([np.inf], 2.0**14), ([2.0**14], 2.0**14)):
        values, state = optimizer.stateless_apply(state, tensors(grad), values)
        assert float(optimizer.stateless_scale_loss(state, 1.0)) == scale
    assert ops.convert_to_numpy(values[0]).tolist() == [0.5]
    with pytest.raises(ValueError, match="`optimizer_variables` must hold"):
        optimizer.stateless_scale_loss(state[1:], 1.0)


def test_pure_float16_weights_never_overflow_in_the_update():
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(64.0), initial_scale=1.0)
    weight = keras.Variable(np.float16([60000.0]), dtype="float16")
    optimizer.apply([ops.convert_to_tensor(np.float16([-1000.0]))], [weight])
    assert ops.convert_to_numpy(weight).tolist() == [60000.0]


def store_of(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def test_saved_state_begins_with_that_of_keras_and_loads_it():
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), 8.0)
    theirs.build(variables(*START))
    for i, v in enumerate(theirs.variables):
        if "learning_rate" not in v.path:
            v.assign(ops.full(v.shape, i + 1, v.dtype))
    ours = mp.LossScaleOptimizer("adam")
    ours.build(variables(*START))
    ours.load_own_variables(store_of(theirs))
    saved, original = store_of(ours), store_of(theirs)
    for key, value in original.items():
        assert np.array_equal(saved[key], value), key
    assert float(ours.loss_scale) == 4.0
    assert ours.overflow_count == 0


@pytest.mark.parametrize(("broken", "mended"), [(0.0, 2.0**-14), (np.inf, 2.0**24)])
def test_a_scale_that_keras_broke_is_mended_on_load(broken, mended):
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    theirs.build(variables([1.0]))
    theirs.dynamic_scale.assign(broken)
    ours = mp.LossScaleOptimizer("sgd")
    ours.build(variables([1.0]))
    ours.load_own_variables(store_of(theirs))
    assert float(ours.loss_scale) == mended


def test_own_state_survives_with_every_counter():
    first, weights = mp.LossScaleOptimizer("adam", hysteresis=3), variables(*START)
    for grads in (GRADS[0], [GRADS[1][0], [np.inf, 1.0]], [GRADS[2][0], BAD[:2]]):
        scaled_step(first, grads, weights)
    second = mp.LossScaleOptimizer("adam", hysteresis=3)
    second.build(weights)
    second.load_own_variables(store_of(first))
    for left, right in zip(first.variables, second.variables, strict=True):
        assert np.array_equal(ops.convert_to_numpy(left), ops.convert_to_numpy(right))
    assert second.overflow_count == 2
