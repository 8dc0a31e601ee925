"""`benchmark`: step time and peak memory of one's own model, per policy."""

from __future__ import annotations

import datetime
import functools
import statistics
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mixprec import hardware
from keras_mixprec.benchmark_result import BenchmarkResult
from keras_mixprec.benchmark_result import BenchmarkRow
from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.plan import check_model
from keras_mixprec.precision_plan import check_policy
from keras_mixprec.timing import TimedFit
from keras_mixprec.untouched import left_as_it_was

_OUT_OF_MEMORY = ("resource_exhausted", "resourceexhausted", "out of memory", "oom")


def benchmark(
    model: keras.Model,
    x: Any,
    y: Any = None,
    policies: Sequence[str] = ("float32", "mixed_float16", "mixed_bfloat16"),
    batch_size: int = 32,
    steps: int = 10,
    blocks: int = 5,
    warmup: int = 1,
    keep_float32: Any = (),
    verbose: int | Callable[[int], None] = 1,
) -> BenchmarkResult:
    """Measure the train step of a compiled model in several policies.

    Each policy starts from the same weights, with a fresh optimizer of the same
    settings, and trains by `fit` on the same batches. One step is timed apart, because
    it compiles; then `warmup` blocks pass untimed and `blocks` blocks are timed, each
    an epoch of `steps` steps that ends when the device has finished. The time is that
    of `fit`, getting the data onto the device included. Afterwards the model is as
    it was: weights, policies, optimizer, compiled functions.

    Example:

    ```python
    result = mp.benchmark(model, x, y, batch_size=64)
    print(result)
    result["mixed_float16"].speedup
    ```

    Args:
        model: `keras.Model`, compiled.
        x: Inputs: array, or a list or dict of arrays. One batch is enough: samples
            are taken in order, and again from the start when they run out.
        y: Targets, likewise. Defaults to none.
        policies: The policies; the first is what others are compared with.
            Defaults to `("float32", "mixed_float16", "mixed_bfloat16")`.
        batch_size: Int, samples per step. Defaults to `32`.
        steps: Int, steps per block. Defaults to `10`.
        blocks: Int, timed blocks. Defaults to `5`.
        warmup: Int, blocks before timing. Defaults to `1`.
        keep_float32: What stays in float32, as for `convert`. Defaults to nothing.
        verbose: 0 for silence, 1 for a progress bar, or a function that is called
            after each block with the number of all blocks. Defaults to `1`.

    Returns:
        A `BenchmarkResult`. A policy that ran out of memory, or that this device or
        this model cannot do, is a row with its `error`.

    Raises:
        TypeError: If `model` is no model, or `x` holds no arrays.
        ValueError: If the model is not compiled, a policy is unknown, a number is
            too small, or there are no samples.
        Exception: What training in the first policy raises, out of memory excepted.
    """
    policies = [check_policy(policy) for policy in policies]
    _check(model, policies)
    _check_at_least(1, batch_size=batch_size, steps=steps, blocks=blocks)
    _check_at_least(0, warmup=warmup)
    data = _samples((x, y), batch_size * steps)
    if not model.built:
        model(keras.tree.map_structure(lambda a: a[:1], data[0]))
    advance = _progress(verbose, len(policies) * (1 + warmup + blocks))
    timed = TimedFit(model, data, batch_size, steps, advance)
    measure = functools.partial(
        _measured, timed, warmup=warmup, blocks=blocks, keep_float32=keep_float32
    )
    rows = {}
    # float32 last: where a peak cannot be reset, only one above all before it shows.
    for policy in sorted(set(policies), key=lambda p: (p == "float32", p)):
        with left_as_it_was(model):
            rows[policy] = _row(measure, policy, policy == policies[0])
    ordered = [rows[policy].compared(rows[policies[0]]) for policy in policies]
    return BenchmarkResult(
        model.name,
        keras.backend.backend(),
        ", ".join(hardware.gpu_memory()) or "CPU",
        batch_size,
        1 + (warmup + blocks) * steps,
        datetime.date.today().isoformat(),
        {"keras": keras.__version__},
        ordered,
    )


def _progress(verbose, blocks):
    if callable(verbose):
        return functools.partial(verbose, blocks)
    bar = keras.utils.Progbar(blocks, verbose=verbose, unit_name="block")
    return functools.partial(bar.add, 1)


def _check(model, policies):
    check_model(model)
    if not model.compiled:
        raise ValueError(
            "Expected a compiled model. "
            f"Received: model '{model.name}', not compiled. "
            "Call `model.compile(...)` first: the train step needs a loss."
        )
    if not policies:
        raise ValueError(
            "Expected at least one policy. Received: policies=(). Leave it out for "
            "float32, mixed_float16 and mixed_bfloat16."
        )


def _check_at_least(least, **numbers):
    for name, value in numbers.items():
        if value < least:
            raise ValueError(
                f"Expected `{name}` to be at least {least}. "
                f"Received: {name}={value}. Leave it out for the default."
            )


def _samples(structure, count):
    """Return `count` samples of each array, from the start again when they run out."""

    def take(array):
        if not hasattr(array, "shape") or len(array.shape) == 0:
            raise TypeError(
                "Expected `x` and `y` to be arrays, or lists or dicts of arrays. "
                f"Received: {type(array)}. From a dataset take one batch: "
                "`x, y = next(iter(dataset))`."
            )
        array = np.asarray(keras.ops.convert_to_numpy(array))
        if len(array) == 0:
            raise ValueError(
                f"Expected samples. Received: an array of shape {array.shape}. "
                "Pass one batch at least."
            )
        if len(array) >= count:
            return array[:count]
        return np.take(array, np.arange(count) % len(array), axis=0)

    return keras.tree.map_structure(lambda a: None if a is None else take(a), structure)


def _row(measure, policy, is_first):
    try:
        return measure(policy)
    except Exception as error:
        if _is_out_of_memory(error):
            return BenchmarkRow(policy, error="out of memory")
        if is_first:
            raise
        reason = str(error).strip().split("\n")[0][:200]
        return BenchmarkRow(policy, error=f"{type(error).__name__}: {reason}")


def _is_out_of_memory(error):
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(w in text for w in _OUT_OF_MEMORY)


def _measured(timed, policy, warmup, blocks, keep_float32):
    _set_policy(timed.model, policy, keep_float32)
    hardware.reset_peak_memory()
    compile_s = timed.first_step()
    seconds, loss = timed.blocks(warmup + blocks)
    ms = [1000 * s / timed.steps for s in seconds[warmup:]]
    median = statistics.median(ms)
    optimizer = timed.model.optimizer
    counts = isinstance(optimizer, LossScaleOptimizer)
    return BenchmarkRow(
        policy,
        ms_per_step=median,
        ms_min=min(ms),
        ms_max=max(ms),
        samples_per_s=1000 * timed.batch_size / median,
        compile_s=compile_s,
        peak_memory_mb=timed.peak_memory(),
        loss=loss,
        skipped_steps=optimizer.overflow_count if counts else 0,
    )


def _set_policy(model, policy, keep_float32):
    in_float16 = policy == "mixed_float16"
    for name, value in list(vars(model).items()):
        if isinstance(value, keras.optimizers.Optimizer):
            # Past Keras's tracking: it must not outlive the benchmark.
            object.__setattr__(model, name, _fresh(value, in_float16))
    step = model.train_step
    # A function of its own: JAX keeps what it compiled for an equal one, and bound
    # methods of one model are equal, whatever its precisions were.
    fresh = functools.wraps(step)(lambda *args: step(*args))
    object.__setattr__(model, "train_step", fresh)
    # Twice: a converted model becomes what it was, which may be mixed as well.
    to_float32(model)
    to_float32(model)
    if policy != "float32":
        convert(model, policy, keep_float32)
    if type(model).compile is keras.Model.compile:
        # Metrics of its own: the model's have counted what the user saw.
        config = model._compile_config.config
        model.compile(**{**config, "optimizer": model.optimizer})


def _fresh(optimizer, scaled):
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scales and not scaled:
        optimizer = optimizer.inner_optimizer
    return type(optimizer).from_config(optimizer.get_config())
