"""`benchmark` measures every policy and leaves no trace. No timing is asserted."""

import json
import math

import keras
import numpy as np
import pytest
from support import assert_same_bits
from support import snapshot

from keras_mixprec import compile_hook
from keras_mixprec import hardware
from keras_mixprec.benchmark_result import BenchmarkResult
from keras_mixprec.benchmark_result import BenchmarkRow
from keras_mixprec.benchmarking import benchmark
from keras_mixprec.convert import convert
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.timing import TimedFit

pytestmark = pytest.mark.slow

SHORT = {"batch_size": 8, "steps": 2, "blocks": 2, "verbose": 0}
ALL = ("float32", "mixed_float16", "mixed_bfloat16")
HALF = ("float32", "mixed_float16")


def data(samples=20):
    x = np.random.default_rng(0).normal(size=(samples, 4)).astype("float32")
    return x, x[:, :1]


def compiled(layers=(), kind=keras.Sequential, optimizer="adam"):
    keras.utils.set_random_seed(0)
    body = layers or [keras.layers.Dense(8, activation="relu")]
    head = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = kind([keras.Input((4,)), *body, *head])
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


class Recorder(keras.layers.Layer):
    """Notes the types that it is called with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def call(self, x):
        self.seen.add(keras.backend.standardize_dtype(x.dtype))
        return x

    def compute_output_shape(self, shape):
        return shape


class FailsInFloat16(keras.Sequential):
    """Cannot be trained in float16."""

    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."

    def train_step(self, *args):
        if self.layers[0].compute_dtype == "float16":
            raise RuntimeError(self.message)
        return super().train_step(*args)


class FailsOtherwise(FailsInFloat16):
    message = "the dot product is unsupported\nsecond line"


def test_there_is_a_row_per_policy_in_the_order_asked_for():
    result = benchmark(compiled(), *data(), **SHORT)
    assert [row.policy for row in result] == list(ALL)
    for row in result:
        assert row.error is None
        assert 0 < row.ms_min <= row.ms_per_step <= row.ms_max
        assert row.samples_per_s == pytest.approx(8000 / row.ms_per_step)
        assert row.compile_s > 0
        assert row.peak_memory_mb > 0
        assert math.isfinite(row.loss)
    assert result["float32"].speedup == 1
    assert result["float32"].loss_difference == 0
    assert result["mixed_bfloat16"].speedup == pytest.approx(
        result["float32"].ms_per_step / result["mixed_bfloat16"].ms_per_step
    )
    assert result.steps == 1 + (1 + 2) * 2


def test_the_half_precision_losses_agree_with_float32():
    result = benchmark(compiled(), *data(), **SHORT)
    assert 0 < result["mixed_bfloat16"].loss_difference < 0.1
    # A skipped step is a step behind.
    assert result["mixed_float16"].skipped_steps <= 2
    assert result["mixed_float16"].loss_difference < 0.5


def test_each_policy_computes_in_its_own_precision():
    recorder = Recorder()
    model = compiled([keras.layers.Dense(8), recorder])
    model.fit(*data(), verbose=0)
    for policy, dtype in zip(ALL, ("float32", "float16", "bfloat16"), strict=True):
        recorder.seen.clear()
        benchmark(model, *data(), policies=(policy,), **SHORT)
        assert dtype in recorder.seen, policy


def test_each_policy_starts_from_the_same_weights():
    model = compiled()
    alone = benchmark(model, *data(), policies=("float32",), **SHORT)
    after = benchmark(model, *data(), policies=("mixed_bfloat16", "float32"), **SHORT)
    assert alone["float32"].loss == after["float32"].loss


def test_a_model_that_was_never_fit_is_left_as_it_was():
    model = compiled()
    kind, optimizer, before = type(model), model.optimizer, snapshot(model)
    attributes = {name: id(value) for name, value in vars(model).items()}
    benchmark(model, *data(), **SHORT)
    assert type(model) is kind
    assert model.optimizer is optimizer and not optimizer.built
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert {name: id(value) for name, value in vars(model).items()} == attributes
    assert_same_bits(before, snapshot(model))
    assert not compile_hook.is_installed()


def test_training_goes_on_as_if_nothing_had_been():
    model, twin = compiled(), compiled()
    for each in (model, twin):
        each.fit(*data(), verbose=0, shuffle=False)
    train_function = model.train_function
    benchmark(model, *data(), policies=HALF, **SHORT)
    assert model.train_function is train_function
    for each in (model, twin):
        each.fit(*data(), verbose=0, shuffle=False)
    ours, theirs = (snapshot(m, m.optimizer).values() for m in (model, twin))
    for left, right in zip(ours, theirs, strict=True):
        assert left.tobytes() == right.tobytes()


def test_a_converted_model_stays_converted():
    model = convert(compiled(optimizer=LossScaleOptimizer("adam", 2.0)))
    model.fit(*data(), verbose=0)
    optimizer, policies = model.optimizer, [x.dtype_policy.name for x in model.layers]
    before = snapshot(model, optimizer)
    result = benchmark(model, *data(), policies=HALF, **SHORT)
    assert model.optimizer is optimizer and isinstance(optimizer, LossScaleOptimizer)
    assert [x.dtype_policy.name for x in model.layers] == policies
    assert "mixed_float16" in policies
    assert_same_bits(before, snapshot(model, optimizer))
    assert result["float32"].skipped_steps == 0


def test_a_model_built_in_half_precision_is_also_measured_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    recorder = Recorder()
    model = compiled([keras.layers.Dense(8), recorder])
    keras.config.set_dtype_policy("float32")
    recorder.seen.clear()
    benchmark(model, *data(), policies=("float32",), **SHORT)
    assert recorder.seen == {"float32"}
    assert model.layers[0].dtype_policy.name == "mixed_bfloat16"


def test_the_settings_of_a_loss_scaling_optimizer_are_kept():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=2.0)
    model = compiled(optimizer=optimizer)
    result = benchmark(model, *data(), policies=HALF, **SHORT)
    assert result["mixed_float16"].skipped_steps == 0
    # At a learning rate of zero the loss depends on the statistics alone.
    assert result["mixed_float16"].loss_difference < 0.01


def test_out_of_memory_is_a_row():
    model = compiled(kind=FailsInFloat16)
    before = snapshot(model)
    result = benchmark(model, *data(), policies=HALF, **SHORT)
    assert result["mixed_float16"] == BenchmarkRow(
        "mixed_float16", error="out of memory"
    )
    assert result["float32"].ms_per_step > 0
    assert "mixed_float16: out of memory" in str(result)
    assert_same_bits(before, snapshot(model))


def test_out_of_memory_in_the_first_policy_is_a_row_too():
    model = compiled(kind=FailsInFloat16)
    policies = ("mixed_float16", "float32")
    result = benchmark(model, *data(), policies=policies, **SHORT)
    assert result["mixed_float16"].error == "out of memory"
    assert result["float32"].ms_per_step > 0
    assert result["float32"].speedup is None


def test_what_a_policy_cannot_do_is_a_row():
    model = compiled(kind=FailsOtherwise)
    result = benchmark(model, *data(), policies=HALF, **SHORT)
    error = result["mixed_float16"].error
    assert error == "RuntimeError: the dot product is unsupported"


def test_what_fails_in_the_first_policy_is_raised():
    model = compiled(kind=FailsOtherwise)
    with pytest.raises(RuntimeError, match="unsupported"):
        benchmark(model, *data(), policies=("mixed_float16", "float32"), **SHORT)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}


def test_few_samples_are_repeated_and_structures_pass():
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b")}
    outputs = keras.layers.Dense(1)(keras.layers.Add()(list(inputs.values())))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = {name: np.ones((3, 2), "float32") for name in inputs}
    result = benchmark(model, x, np.ones((3, 1)), policies=("float32",), **SHORT)
    assert result["float32"].samples_per_s > 0


def test_json_and_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        BenchmarkRow("float32", 2.0, 1.9, 2.1, 4000.0, 0.5, 10.0, 0.1, 0, 1.0, 0.0),
        BenchmarkRow("mixed_float16", error="out of memory"),
        BenchmarkRow("mixed_bfloat16", 1.0, 1.0, 1.0, 8000.0, 0.5, None, math.nan),
    ]
    versions = {"keras": keras.__version__}
    result = BenchmarkResult("m", "b", "CPU", 8, 11, "2026-01-01", versions, rows)
    path = tmp_path / "result.json"
    text = result.to_json(path)
    assert path.read_text() == text
    assert json.loads(text)["rows"][2]["loss"] is None
    assert BenchmarkResult.from_json(path).rows[:2] == rows[:2]
    assert BenchmarkResult.from_json(text).device == "CPU"
    result.to_png(tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("can_reset", [True, False])
def test_a_peak_from_before_is_not_reported(monkeypatch, can_reset):
    peaks = iter([10.0, 10.0, 20.0])
    monkeypatch.setattr(hardware, "gpu_memory", lambda: {"gpu": (1.0, next(peaks))})
    monkeypatch.setattr(hardware, "reset_peak_memory", lambda: can_reset)
    timed = TimedFit(None, (), 1, 1, None)
    seen = [timed.peak_memory() for _ in range(3)]
    assert seen == ([10.0, 10.0, 20.0] if can_reset else [10.0, None, 20.0])


def test_errors_say_what_to_do():
    x, y = data()
    with pytest.raises(ValueError, match="Call `model.compile"):
        benchmark(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), x, y)
    model = compiled()
    with pytest.raises(ValueError, match="Received: policy='half'"):
        benchmark(model, x, y, policies=("half",))
    with pytest.raises(ValueError, match="at least one policy"):
        benchmark(model, x, y, policies=())
    with pytest.raises(ValueError, match="Received: steps=0"):
        benchmark(model, x, y, steps=0)
    with pytest.raises(ValueError, match="Received: warmup=-1"):
        benchmark(model, x, y, warmup=-1)
    with pytest.raises(ValueError, match="Expected samples"):
        benchmark(model, x[:0], y[:0])
    with pytest.raises(TypeError, match="take one batch"):
        benchmark(model, (pair for pair in [(x, y)]))
    with pytest.raises(TypeError, match="keras.Model"):
        benchmark(keras.layers.Dense(1), x, y)
