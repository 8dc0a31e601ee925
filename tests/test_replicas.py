"""Several replicas under `MirroredStrategy`: one decision, taken over all of them."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest
from processes import ROOT
from processes import search_path

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute"
)

# In a process of its own: logical devices are made before TensorFlow starts.
SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/distributed"]
import numpy as np, tensorflow as tf, keras
from mirrored import devices
import keras_mixprec as mp
from support import classifier, compiled, data

strategy = tf.distribute.MirroredStrategy(devices({replicas}))
wrapper = {wrapper}
for bad in range({replicas}):
    with strategy.scope():
        model = classifier(dtype="mixed_float16")
        optimizer = wrapper(keras.optimizers.SGD(0.5, momentum=0.5))
        compiled(model, optimizer)
    x, y = data(96, bad=range(32 + bad * 32 // {replicas}, 33 + bad * 32 // {replicas}))
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    history = model.fit(batches, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all(), history
    assert np.isfinite(model.evaluate(batches.take(1), verbose=0)).all()
    assert optimizer.overflow_count == 2, optimizer.overflow_count
    assert float(optimizer.loss_scale) == 2.0**13
    assert int(optimizer.inner_optimizer.iterations.numpy()) == 4
    for v in [*model.trainable_variables, *optimizer.variables]:
        copies = [np.asarray(c) for c in strategy.experimental_local_results(v.value)]
        assert all(np.isfinite(c).all() for c in copies), v.path
        assert all(c.tobytes() == copies[0].tobytes() for c in copies), v.path
    print("finite and equal with the overflow on replica", bad)
"""


def run(replicas, wrapper):
    code = SCRIPT.format(
        tests=str(pathlib.Path(__file__).parent), replicas=replicas, wrapper=wrapper
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": search_path(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_row_2_an_overflow_on_any_replica_is_one_decision_for_all(replicas):
    result = run(replicas, "mp.LossScaleOptimizer")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finite and equal") == replicas


@pytest.mark.slow
def test_row_2_destroys_the_model_with_the_wrapper_of_keras():
    result = run(2, "keras.optimizers.LossScaleOptimizer")
    assert result.returncode != 0
    assert "AssertionError" in result.stderr
