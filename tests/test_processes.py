"""Several processes on loopback: MultiWorkerMirrored, jax.distributed, torch DDP.

Every job has a deadline and is killed at its end, whatever happened.
"""

import time

import pytest
from faults import MAX_SCALE
from jobs import BACKEND
from jobs import job
from jobs import run_job
from jobs import words

pytestmark = pytest.mark.slow
# What comes before the inner optimizer on each engine's command line, and after it.
BEFORE = {"jax": ["data"]}.get(BACKEND, [])
CASES = [("plain", []), ("most", [])]
if BACKEND == "torch":
    CASES = [("plain", ["1"]), ("plain", ["2"]), ("most", ["2"])]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("inner, after", CASES)
def test_training_survives_faults_on_each_process(processes, inner, after):
    outputs = run_job(processes, "survive", *BEFORE, inner, *after)
    digests = {tuple(words(o, "digest")[0]) for o in outputs}
    assert len(digests) == 1, digests


@pytest.mark.skipif(BACKEND == "jax", reason="test_replicas_jax.py has the curves")
def test_two_processes_learn_as_one_does():
    outputs = run_job(2, "curves", "plain", "all")
    assert all(len(words(o, "same")) == 2 for o in outputs)


def test_a_dead_process_stops_the_others_and_training_resumes(tmp_path):
    with job(2, "watched", tmp_path, 10000) as training:
        while not _epochs(training.output(0)) or _epochs(training.output(0))[-1] < 2:
            assert time.monotonic() < training.ends, training.output(0)
            time.sleep(0.05)
        training.kill(1)
        (code,) = training.wait([0])
        # The engine's own error, not a hang: `None` would be the deadline.
        assert code, training.output(0)
        last = _epochs(training.output(0))[-1]
    outputs = run_job(2, "watched", tmp_path, last + 4)
    assert outputs[0].count("epoch") and _epochs(outputs[0])[0] in (last, last + 1)
    for output in outputs:
        for epoch, scale in _reports(output):
            assert scale == MAX_SCALE / 2 ** (epoch + 1), output


def _reports(output):
    return [(int(w[0]), float(w[2])) for w in words(output, "epoch") if len(w) == 3]


def _epochs(output):
    return [epoch for epoch, _ in _reports(output)]
