"""tf.distribute: faults on each replica in turn, and N replicas against one."""

import json

import keras
import pytest
import tensorflow as tf
from faults import INNER
from processes import Processes
from processes import free_ports
from processes import run
from support import compiled
from support import half_classifier

import keras_mixprec as mp

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute"
)
MIRRORED = "tests/distributed/mirrored.py"


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("inner", ["plain", "all"])
def test_training_survives_faults_on_each_replica(replicas, inner):
    (output,) = run(MIRRORED, [["survive", replicas, inner]], deadline=400)
    assert "survived" in output


@pytest.mark.slow
def test_one_device_survives_with_xla_and_without_and_several_refuse_it():
    (output,) = run(MIRRORED, [["xla", 2]], deadline=400)
    assert output.count("survived") == 4
    assert output.count("refused") == 2


@pytest.mark.slow
@pytest.mark.parametrize("replicas, inners", [(2, list(INNER)), (4, ["all"])])
def test_replicas_learn_as_one_device_does(replicas, inners):
    (output,) = run(MIRRORED, [["curves", replicas, *inners]], deadline=400)
    assert output.count("same curve") == len(inners)
    assert "same in half precision" in output


def test_accumulation_sums_over_replicas_and_survives_an_overflow():
    (output,) = run(MIRRORED, [["accumulate", 2]])
    assert "exact" in output


def test_xla_over_several_replicas_is_refused_before_anything_is_traced(monkeypatch):
    model = half_classifier()
    replicas = property(lambda self: 2)
    monkeypatch.setattr(tf.distribute.Strategy, "num_replicas_in_sync", replicas)
    with pytest.raises(ValueError, match="`jit_compile` must be False"):
        compiled(model, mp.LossScaleOptimizer("adam"), jit_compile=True)


@pytest.mark.slow
def test_parameter_servers_skip_what_overflows():
    addresses = [f"127.0.0.1:{p}" for p in free_ports(4)]
    cluster = {"chief": addresses[:1], "ps": addresses[1:2], "worker": addresses[2:]}
    tasks = [("chief", 0), ("ps", 0), ("worker", 0), ("worker", 1)]
    environments = [
        {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": t, "index": i}})}
        for t, i in tasks
    ]
    script = "tests/distributed/parameter_server.py"
    with Processes(script, [[]] * 4, environments) as job:
        assert job.wait([0]) == [0], job.output(0)[-4000:]
        assert "survived" in job.output(0)
