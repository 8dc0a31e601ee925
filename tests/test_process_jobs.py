"""The tests' own jobs: what hangs says where, what fails stops the rest."""

import subprocess
import sys
import time

import processes
import pytest
from processes import TESTS
from processes import Processes
from processes import free_ports
from processes import run

SCRIPT = """
import sys, time
if sys.argv[1] == "fail":
    sys.exit(3)
def waits_for_ever():
    time.sleep(600)
waits_for_ever()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_what_hangs_says_where(script):
    with Processes(script, [["hang"]], deadline=3) as job:
        assert job.wait() == [None]
        assert "waits_for_ever" in job.output(0)


def test_one_that_fails_ends_the_wait_for_the_others(script, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1)
    start = time.monotonic()
    with pytest.raises(AssertionError, match="process 1 ended with 3"):
        run(script, [["hang"], ["fail"]], deadline=100)
    assert time.monotonic() - start < 60


def test_jobs_find_what_this_process_finds(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("print('found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "job.py").write_text("import faults, only_here")
    assert "found" in run(tmp_path / "job.py", [[]])[0]


def test_no_two_test_processes_get_the_same_port(monkeypatch):
    mine = free_ports(2)
    # In another process, to which but one port and those of this one are left.
    code = f"""
import processes, secrets
offered = iter({[port - 10_000 for port in mine]} + list(range(1000)))
secrets.randbelow = lambda limit: next(offered)
print(processes.free_ports(1)[0])
"""
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True
    )
    assert int(other.stdout) not in mine, other.stderr
