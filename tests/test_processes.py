"""Several processes on loopback: MultiWorkerMirrored, jax.distributed, torch DDP.

Every job has a deadline and is killed at its end, whatever happened.
"""

import re
import signal
import time

import pytest
from faults import MAX_SCALE
from jobs import BACKEND
from jobs import job
from jobs import run_example
from jobs import run_job
from jobs import words

pytestmark = pytest.mark.slow
# What comes before the inner optimizer on each engine's command line, and after it.
BEFORE = {"jax": ["data"]}.get(BACKEND, [])
CASES = [("plain", []), ("most", [])]
if BACKEND == "torch":
    CASES = [("plain", ["1"]), ("plain", ["2"]), ("most", ["2"])]
# What each engine says of a process that is gone.
GONE = {
    "tensorflow": "(?i)unavailable|aborted|peer|heartbeat",
    "jax": "(?i)JAX distributed service|coordination|gloo.*(closed|reset)",
    # gloo, and NCCL, which waits for as long as it was told.
    "torch": "(?i)(connection|socket) (closed|reset|was)|broken pipe|by peer"
    "|watchdog caught collective operation timeout",
}[BACKEND]
# How many, of whom one dies; four on the engine that notices at once.
DYING = [2, 4] if BACKEND == "torch" else [2]
# Who can die in mid-step: on JAX who is called back from the step, one program.
VICTIMS = [0] if BACKEND == "jax" else [0, 1]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("inner, after", CASES)
def test_training_survives_faults_on_each_process(processes, inner, after):
    outputs = run_job(processes, "survive", *BEFORE, inner, *after)
    digests = {tuple(words(o, "digest")[0]) for o in outputs}
    assert len(digests) == 1, digests


@pytest.mark.skipif(BACKEND != "torch", reason="the loop of Keras's guide for torch")
@pytest.mark.parametrize("processes", [2, 4])
def test_a_loop_of_ones_own_survives_faults_on_each_process(processes):
    outputs = run_job(processes, "loop", "most")
    assert len({tuple(words(o, "digest")[0]) for o in outputs}) == 1


def test_the_example_runs():
    chief, _ = run_example(2)
    assert "overflow_total" in chief


def test_every_process_has_the_logs_and_the_chief_alone_speaks(tmp_path):
    outputs = run_job(2, "monitored", tmp_path)
    assert all("monitored" in o for o in outputs)
    assert [o.count("overflowed this epoch") for o in outputs] == [2, 0]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["0.jsonl", "0.plan.json"]
    assert len((tmp_path / "0.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(BACKEND == "jax", reason="test_replicas_jax.py has the curves")
def test_two_processes_learn_as_one_does():
    outputs = run_job(2, "curves", "plain", "all")
    assert all(o.count("same curve") == 2 for o in outputs)
    assert all("same in half precision" in o for o in outputs)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MultiWorkerMirroredStrategy")
def test_keras_has_no_fit_on_several_workers():
    # Once it has, docs/scaling.md and the example want rewriting.
    assert all("refused" in o for o in run_job(2, "refused"))


@pytest.mark.skipif(BACKEND == "jax", reason="test_replicas_jax.py counts them")
def test_the_decision_adds_nothing_to_what_processes_tell_each_other():
    assert all(words(o, "collectives") for o in run_job(2, "collectives"))


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")
# Two processes of four devices: the batch is split between them, and the weights within
# each, or every weight over both. Four processes of one device: over all of them.
@pytest.mark.parametrize(
    "kind, processes, devices", [("model", 2, 4), ("across", 2, 4), ("model", 4, 1)]
)
def test_a_model_that_is_sharded_survives_faults_on_each_process(
    kind, processes, devices, monkeypatch
):
    flag = f"--xla_force_host_platform_device_count={devices}"
    monkeypatch.setenv("XLA_FLAGS", flag)
    outputs = run_job(processes, "survive", kind, "most")
    digests = {tuple(words(o, "digest")[0]) for o in outputs}
    assert len(digests) == 1, digests


@pytest.mark.parametrize("processes", DYING)
def test_a_dead_process_stops_the_others_and_training_resumes(processes, tmp_path):
    with job(processes, "watched", tmp_path, 10000) as training:
        while not _epochs(training.output(0)) or _epochs(training.output(0))[-1] < 2:
            assert time.monotonic() < training.ends, training.output(0)
            time.sleep(0.05)
        training.kill(1)
        survivors = [i for i in range(processes) if i != 1]
        # The engine's own error, not a hang: `None` would be the deadline.
        assert all(training.wait(survivors)), training.output(0)
        _check_that_they_say_why(training, survivors)
        last = _epochs(training.output(0))[-1]
    resumed = _check_that_it_resumes(processes, tmp_path, last + 4)
    assert resumed in (last, last + 1)


@pytest.mark.parametrize("victim", VICTIMS)
def test_one_that_dies_in_mid_step_ends_the_others_and_training_resumes(
    victim, tmp_path
):
    with job(2, "dying", tmp_path, victim) as training:
        codes = training.wait()
        survivor = 1 - victim
        assert codes[survivor] and codes[victim] == -signal.SIGKILL, codes
        _check_that_they_say_why(training, [survivor])
    assert _check_that_it_resumes(2, tmp_path, 4) == 1


def _check_that_it_resumes(processes, folder, epochs):
    """Each epoch's scale is that of an undisturbed run. Returns the first epoch."""
    outputs = run_job(processes, "watched", folder, epochs)
    for output in outputs:
        assert _epochs(output)[-1] == epochs - 1, output
        for epoch, scale in _reports(output):
            assert scale == MAX_SCALE / 2 ** (epoch + 1), output
    return _epochs(outputs[0])[0]


def _check_that_they_say_why(training, survivors):
    for output in map(training.output, survivors):
        assert re.search(GONE, output), output
        assert "Timeout (" not in output, output


def _reports(output):
    return [(int(w[0]), float(w[2])) for w in words(output, "epoch") if len(w) == 3]


def _epochs(output):
    return [epoch for epoch, _ in _reports(output)]
