"""The rule, against a plain Python reference and at its bounds."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_mixprec.loss_scale import LossScaleRule
from keras_mixprec.loss_scale import LossScaleState
from keras_mixprec.loss_scale import next_state

SEQUENCES, EXAMPLES = 100, 100  # 10,000 sequences of gradients


def reference(state, finite, rule):
    """One step in Python's own numbers, written from the papers, not from the code."""
    scale, tracker, left, count, consecutive = state
    if not finite:
        if left == 1:
            scale = max(scale * rule.backoff_factor, rule.min_scale)
        else:
            left -= 1
        if rule.consecutive_hysteresis is False and left < 1:
            left = 1
        return scale, 0, left, count + 1, consecutive + 1
    tracker += 1
    if rule.consecutive_hysteresis:
        left = rule.hysteresis
    if tracker == rule.growth_steps:
        scale, tracker = min(scale * rule.growth_factor, rule.max_scale), 0
        left = rule.hysteresis
    return scale, tracker, left, count, 0


powers = st.integers(-14, 24).map(lambda n: 2.0**n)
rules = st.builds(
    lambda bounds, **fields: LossScaleRule(
        min_scale=bounds[0], initial_scale=bounds[1], max_scale=bounds[2], **fields
    ),
    st.tuples(powers, powers, powers).map(sorted),
    growth_steps=st.integers(1, 5),
    growth_factor=st.sampled_from([1.0, 2.0, 4.0]),
    backoff_factor=st.sampled_from([0.25, 0.5, 1.0]),
    hysteresis=st.integers(1, 4),
    consecutive_hysteresis=st.booleans(),
)
gradients = st.sampled_from([1.0, np.inf, -np.inf, np.nan])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(rules, st.integers(0, 2**32 - 1), st.integers(1, 20), st.floats(0.05, 0.95))
def test_follows_the_reference_exactly(rule, seed, steps, share_finite):
    rng = np.random.default_rng(seed)
    kinds = np.array([np.inf, -np.inf, np.nan])
    grads = rng.choice(kinds, size=(steps, SEQUENCES))
    grads = np.where(rng.random(grads.shape) < share_finite, 1.0, grads)
    start = (rule.initial_scale, 0, rule.hysteresis, 0, 0)
    expected = [start] * SEQUENCES
    state = LossScaleState(*(ops.convert_to_tensor([v] * SEQUENCES) for v in start))
    for row in grads:
        finite = np.isfinite(row)
        expected = [
            reference(s, bool(f), rule) for s, f in zip(expected, finite, strict=True)
        ]
        state = next_state(state, ops.convert_to_tensor(finite), rule)
    for field, want in zip(state, zip(*expected, strict=True), strict=True):
        assert ops.convert_to_numpy(field).tolist() == list(want)


def run(rule, finite_steps):
    state = LossScaleState(
        *map(ops.convert_to_tensor, (rule.initial_scale, 0, rule.hysteresis, 0, 0))
    )
    scales = []
    for finite in finite_steps:
        state = next_state(state, ops.convert_to_tensor(finite), rule)
        scales.append(float(state.scale))
    return scales, state


def test_scale_stops_at_the_floor():
    scales, state = run(LossScaleRule(min_scale=2.0**10), [False] * 20)
    assert scales[:6] == [2.0**14, 2.0**13, 2.0**12, 2.0**11, 2.0**10, 2.0**10]
    assert scales[-1] == 2.0**10
    assert int(state.overflow_count) == int(state.consecutive_overflows) == 20


def test_scale_stops_at_the_ceiling():
    rule = LossScaleRule(initial_scale=2.0**22, growth_steps=1)
    assert run(rule, [True] * 4)[0] == [2.0**23, 2.0**24, 2.0**24, 2.0**24]


def test_hysteresis_delays_the_first_backoff_and_refills_at_growth():
    rule = LossScaleRule(hysteresis=2, growth_steps=2)
    steps = [False, False, False, True, True, False, False]
    expected = [15, 14, 13, 13, 14, 14, 13]
    assert run(rule, steps)[0] == [2.0**n for n in expected]


def test_consecutive_hysteresis_refills_at_every_finite_step():
    steps = [False, True, False, True, False, False]
    rule = LossScaleRule(hysteresis=2, consecutive_hysteresis=True)
    assert run(rule, steps)[0] == [2.0**15] * 5 + [2.0**14]
    rule = dataclasses.replace(rule, consecutive_hysteresis=False)
    assert run(rule, steps)[0] == [2.0**n for n in (15, 15, 14, 14, 13, 12)]


def test_factors_of_one_are_a_fixed_scale():
    rule = LossScaleRule(
        initial_scale=1024.0, growth_factor=1.0, backoff_factor=1.0, growth_steps=1
    )
    scales, state = run(rule, [True, False, True, False])
    assert scales == [1024.0] * 4
    assert int(state.overflow_count) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_scale", 0.0),
        ("min_scale", 2.0**25),
        ("min_scale", 2.0**-127),
        ("max_scale", 2.0**127),
        ("max_scale", float("inf")),
        ("initial_scale", 2.0**25),
        ("initial_scale", float("nan")),
        ("growth_factor", 0.5),
        ("growth_factor", float("nan")),
        ("backoff_factor", 0.0),
        ("backoff_factor", 1.5),
        ("hysteresis", 0),
        ("growth_steps", 0),
    ],
)
def test_rejects_numbers_out_of_range(field, value):
    with pytest.raises(ValueError, match=r"must .*Received: .*\. [A-Z]"):
        LossScaleRule(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("growth_factor", "2"), ("hysteresis", 1.5), ("min_scale", None)],
)
def test_rejects_what_is_not_a_number(field, value):
    with pytest.raises(TypeError, match=f"`{field}` must be .*Received: {field}="):
        LossScaleRule(**{field: value})


def test_whole_numbers_may_be_written_as_floats():
    rule = LossScaleRule(growth_steps=2e3, hysteresis=2.0)
    assert (rule.growth_steps, rule.hysteresis) == (2000, 2)
    assert all(type(n) is int for n in (rule.growth_steps, rule.hysteresis))
    assert run(rule, [False, False])[0] == [2.0**15, 2.0**14]


def test_bounds_are_told_apart_from_their_order():
    with pytest.raises(ValueError, match="must lie in .* `compile=False`"):
        LossScaleRule(max_scale=2.0**127)
    with pytest.raises(ValueError, match="at most `max_scale`.* Swap"):
        LossScaleRule(min_scale=8.0, max_scale=4.0)
