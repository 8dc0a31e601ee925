"""`calibrate`: a plan from measured ranges and errors."""

from __future__ import annotations

import copy
import time
from typing import Any

import keras
import numpy as np

from keras_mixprec.advice import advise
from keras_mixprec.dry_run import dry_run
from keras_mixprec.plan import build_on
from keras_mixprec.plan import check_model
from keras_mixprec.plan import decide
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precision_plan import check_policy
from keras_mixprec.precisions import preserved
from keras_mixprec.search import CALIBRATED
from keras_mixprec.search import Search
from keras_mixprec.structure import walk
from keras_mixprec.time_bar import TimeBar
from keras_mixprec.trials import Trials
from keras_mixprec.untouched import unchanged_variables

# Of the outputs' relative error: sixteen to twenty roundings of the type.
TOLERANCE = {"mixed_float16": 0.01, "mixed_bfloat16": 0.08}
# What the search stays below the tolerance by, for data it does not see.
_MARGIN = 0.75
_COSTS = {
    "fewest": lambda row: 1.0,
    "memory": lambda row: 1.0 + row.measured.get("activation_bytes", 0.0),
    "speed": lambda row: 1.0 + row.multiply_adds,
}


def calibrate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    policy: str = "mixed_float16",
    tolerance: float | None = None,
    *,
    keep_float32: Any = (),
    search: str = "fewest",
    batch_size: int = 32,
    batches: int = 4,
    seed: int = 0,
    max_seconds: float = 300.0,
    verbose: int = 1,
) -> PrecisionPlan:
    """Measure a model on real data, and plan the fewest layers in float32.

    The plan begins as `plan` makes it. Then the layer to blame goes to float32, one
    after the other, each chosen by measuring what it gains, until the outputs are
    within the tolerance and the gradients of all weights finite; then what is not
    needed any more comes back. The last batch is not searched on but checked, outputs
    and gradients. The
    model is run in inference mode and left as it was.

    Example:

    ```python
    plan = mp.calibrate(model, x, y, tolerance=0.01)
    model = mp.convert(model, plan=plan)
    model.compile(mp.LossScaleOptimizer("adam", initial_scale=plan.initial_scale), loss)
    ```

    Args:
        model: `keras.Model`, built, or built on the first batch.
        x: Inputs: array, or a list or dict of arrays.
        y: Targets, likewise; the loss of a compiled model is what gradients are
            measured of. Defaults to none: then it is the mean of the outputs in a
            random direction.
        policy: `"mixed_float16"` or `"mixed_bfloat16"`. Defaults to
            `"mixed_float16"`.
        tolerance: Float, the relative error of the outputs (L2 norms) to stay under.
            Defaults to `0.01`, in bfloat16 `0.08`.
        keep_float32: What stays in float32 anyway, as for `plan`. Defaults to nothing.
        search: What to have little of in float32: `"fewest"` layers, `"memory"`
            (bytes of activations) or `"speed"` (multiply-adds). Defaults to
            `"fewest"`.
        batch_size: Int, examples per batch. Defaults to `32`.
        batches: Int, how many batches. Defaults to `4`.
        seed: Int; the same seed gives the same plan, unless the time runs out.
            Defaults to `0`.
        max_seconds: Float, how long to search layer by layer; from then on half of
            those left go to float32 at once. Defaults to `300`.
        verbose: 0 for silence, 1 for a progress bar of the time. Defaults to `1`.

    Returns:
        A `PrecisionPlan` with `initial_scale`, the loss scale to begin with, and with
        `measured` in each row: `max_abs` and `headroom` (65504 over it) of the
        outputs; `gradient_max_abs` and `underflow_share` of their gradients at that
        scale; `own_error`, the relative error in half precision fed with float32
        inputs; `activation_bytes` of one example.

    Raises:
        TypeError: If `model` is no model, or `x` holds no arrays.
        ValueError: If an argument is out of its range, or the float32 outputs are not
            finite.
    """
    check_model(model)
    policy = check_policy(policy)
    _check(policy, tolerance, search, batch_size, batches, max_seconds)
    deadline = time.monotonic() + max_seconds
    tolerance = TOLERANCE[policy] if tolerance is None else tolerance
    drawn = _draw(x, y, batch_size, batches, seed)
    build_on(model, drawn[0][0])
    made = _begun(model, policy, keep_float32, drawn[0][0])
    half = {row.path: row.policy for row in made if row.policy in HALF}
    searched = _searched(drawn)
    all_half = copy.deepcopy(made)
    for batch in searched:
        dry_run(model, made, drawn[batch][0])
    bar = TimeBar(max_seconds, verbose)
    with preserved(model), unchanged_variables(model):
        trials = Trials(model, drawn, seed)
        _note_own_errors(trials, all_half, made, searched)
        _note_ranges(trials, made, searched)
        target, cost = _MARGIN * tolerance, _COSTS[search]
        _settle(
            Search(trials, made, half, target, cost, deadline, bar.show),
            tolerance,
            searched,
        )
        _note_ranges(trials, made, searched)
        made.initial_scale = trials.initial_scale
    bar.end()
    advise([place.layer for place in walk(model)], made)
    return made


def _begun(model, policy, keep_float32, sample) -> PrecisionPlan:
    """Return the plan of the rules, without what an earlier calibration found."""
    made = decide(model, policy, keep_float32, sample)
    for row in made:
        if row.reason.startswith(CALIBRATED):
            row.policy, row.reason = policy, "half precision"
    return made


def _searched(drawn) -> range:
    """Return the batches to search on: all but the last, which is checked."""
    return range(max(len(drawn) - 1, 1))


def _note_own_errors(trials, all_half, made, searched):
    try:
        own = trials.own_errors(all_half, searched)
    except Exception:  # Not all of it runs in half precision.
        own = trials.own_errors(made, searched)
    for path, error in own.items():
        made[path].measured["own_error"] = error


def _note_ranges(trials, made, searched):
    for path, found in trials.measurements(searched).items():
        made[path].measured |= found


def _settle(search, tolerance, searched):
    """Search; then check on all batches, and take in the last if it does not agree."""
    trials, made = search.trials, search.plan
    every = range(trials.count)
    error = search.run(searched)
    checked = trials.error(made, every[-1:])
    damaged = trials.gradient_errors(made, every)
    if error <= tolerance and (checked > tolerance or damaged):
        error = checked = search.run(every)
        damaged = trials.gradient_errors(made, every)
    if search.timed_out:
        made.advice.append(
            "the time ran out: more layers may be in float32 than need be; raise "
            "`max_seconds`"
        )
    if max(error, checked) > tolerance:
        made.advice.append(
            f"the error is {max(error, checked):.1e}, above the tolerance: what is "
            "left in half precision is not for a plan to change"
        )
    if damaged:
        made.advice.append("gradients are damaged, and no layer is to blame alone")


def _draw(x, y, batch_size, batches, seed) -> list[tuple]:
    """Return the batches, drawn at random; fewer or smaller ones of little data."""
    arrays = [a for a in keras.tree.flatten(x) if hasattr(a, "shape")]
    if not arrays or not arrays[0].shape:
        raise TypeError(
            "Expected `x` to hold arrays with one row per example. "
            f"Received: x of type {type(x)}. Pass a few batches of inputs as arrays."
        )
    count = int(arrays[0].shape[0])
    order = np.random.default_rng(seed).permutation(count)
    size = max(1, min(batch_size, count // batches))
    parts = [order[i * size : (i + 1) * size] for i in range(batches)]
    return [
        keras.tree.map_structure(
            lambda a, part=part: None if a is None else np.asarray(a)[part], (x, y)
        )
        for part in parts
        if len(part)
    ]


def _check(policy, tolerance, search, batch_size, batches, max_seconds):
    if policy not in HALF:
        raise ValueError(
            "Expected `policy` to be a half policy, "
            f"{' or '.join(map(repr, HALF))}. Received: policy={policy!r}. In float32 "
            "there is nothing to calibrate."
        )
    if search not in _COSTS:
        raise ValueError(
            f"Expected `search` to be one of {', '.join(map(repr, _COSTS))}. "
            f"Received: search={search!r}. Leave it out for the fewest layers."
        )
    numbers = {"batch_size": batch_size, "batches": batches, "max_seconds": max_seconds}
    if tolerance is not None:
        numbers["tolerance"] = tolerance
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(
                f"Expected `{name}` to be above 0. Received: {name}={value!r}. "
                "Leave it out for the default."
            )
