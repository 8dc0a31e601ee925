"""TensorFlow: what only a GPU does, done on a CPU."""

import types

import keras
import numpy as np
import pytest
from support import assert_overflows_are_skipped
from support import data
from support import half_classifier

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's own ways to keep an update", allow_module_level=True)

import tensorflow as tf  # noqa: E402

import keras_mixprec as mp  # noqa: E402
from keras_mixprec.backend import engine  # noqa: E402
from keras_mixprec.backend import tensorflow_commit  # noqa: E402
from keras_mixprec.backend.tensorflow_xla import compiling  # noqa: E402


@pytest.fixture
def selected(monkeypatch):
    """A CPU taken for a GPU. Yields whether XLA compiled, for each traced update."""
    select, compiled = tensorflow_commit._commit_by_select, []

    def counting(update):
        compiled.append(tensorflow_commit.is_compiling())
        select(update)

    monkeypatch.setattr(tensorflow_commit, "_on_gpu", lambda variables: True)
    monkeypatch.setattr(tensorflow_commit, "_commit_by_select", counting)
    return compiled


class Adam(keras.optimizers.Adam):
    """Somebody's own: nothing is known of what its update calls."""


@pytest.mark.parametrize(
    "inner, jit_compile, by_select",
    [("adam", True, {True}), ("adam", False, {True}), (Adam, False, set())],
)
def test_a_gpu_skips_a_step_whole(inner, jit_compile, by_select, selected):
    inner = inner if isinstance(inner, str) else inner()
    model = half_classifier(inner, jit_compile=jit_compile)
    assert_overflows_are_skipped(model)
    # Without XLA around the step, one call of it around the update, if that compiles.
    assert set(selected) == by_select


@pytest.mark.parametrize("xla", [True, False])
@pytest.mark.parametrize("overwritten", [True, False])
@pytest.mark.parametrize("value, applied", [(2.0**50, True), (2.0**57, False)])
def test_all_are_judged_as_they_come(xla, overwritten, value, applied):
    # Float8 statistics come in gradients' places, and no scale was multiplied to them.
    weight, statistic = keras.Variable([1.0]), keras.Variable([1.0])
    statistic.overwrite_with_gradient = overwritten
    optimizer = mp.LossScaleOptimizer("sgd", initial_scale=2.0**8)
    optimizer.build([weight, statistic])
    optimizer.scale_loss(1.0)

    @tf.function(jit_compile=xla)
    def step():
        with compiling(xla):
            grads = [tf.constant([0.0]), tf.constant([value])]
            optimizer.apply(grads, [weight, statistic])

    step()
    assert optimizer.overflow_count == int(not applied)
    assert (statistic.numpy().tolist() == [value]) == (overwritten and applied)


def test_a_gpu_and_a_cpu_learn_the_same(monkeypatch):
    x, y = data(64)
    weights = []
    for on_gpu in (False, True):
        monkeypatch.setattr(
            tensorflow_commit, "_on_gpu", lambda variables, on_gpu=on_gpu: on_gpu
        )
        keras.utils.set_random_seed(0)
        model = half_classifier(keras.optimizers.SGD(0.125), 0.0, jit_compile=True)
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for on_cpu, on_gpu in zip(*weights, strict=True):
        np.testing.assert_array_equal(on_cpu, on_gpu)


@pytest.mark.parametrize("shape, shared", [((16,), True), ((3,), False)])
def test_many_small_variables_are_selected_by_an_array(shape, shared, monkeypatch):
    # XLA makes one kernel of those that read the same array. Of a CPU's it does not.
    variables = [keras.Variable(np.full(shape, i, "float32")) for i in range(8)]
    variables = variables if shared else variables[:7]

    @tf.function(jit_compile=True)
    def step(skipped):
        with compiling(True):
            saved = tensorflow_commit.read(variables)
            for v in variables:
                v.assign(v * 2)
            tensorflow_commit.restore_by_select(skipped, variables, saved)

    for on_gpu in (False, True):
        monkeypatch.setattr(tensorflow_commit, "_on_gpu", lambda v, found=on_gpu: found)
        graph = step.get_concrete_function(tf.TensorSpec((), tf.bool)).graph
        selects = [op for op in graph.get_operations() if op.type == "SelectV2"]
        assert len(selects) == len(variables)
        conditions = {op.inputs[0].ref(): op.inputs[0] for op in selects}.values()
        assert [(c.op.type, c.shape) for c in conditions] == [
            ("XlaOptimizationBarrier", shape)
            if on_gpu and shared
            else ("Placeholder", ())
        ]
        step(tf.constant(True))
        values = [v.numpy().max() for v in variables]
        step(tf.constant(False))
        assert [v.numpy().max() for v in variables] == [2 * x for x in values]
        step = tf.function(step.python_function, jit_compile=True)
    assert values == [2.0 * i for i in range(len(variables))]


def test_memory_is_that_of_the_gpus_that_are_not_hidden(monkeypatch):
    # `tf.config.set_visible_devices` of the second: TensorFlow calls it the first.
    devices = {
        "list_physical_devices": ["/physical_device:GPU:0", "/physical_device:GPU:1"],
        "list_logical_devices": ["/device:GPU:0"],
    }
    for function, names in devices.items():
        found = [types.SimpleNamespace(name=name) for name in names]
        monkeypatch.setattr(tf.config, function, lambda kind, found=found: found)
    asked = []

    def get_memory_info(name):
        asked.append(name)
        return {"current": 1, "peak": 2}

    monkeypatch.setattr(tf.config.experimental, "get_memory_info", get_memory_info)
    monkeypatch.setattr(tf.config.experimental, "reset_memory_stats", asked.append)
    assert engine.memory_info() == {"GPU:0": (1, 2)}
    assert engine.reset_peak_memory()
    assert asked == ["GPU:0"] * 2
