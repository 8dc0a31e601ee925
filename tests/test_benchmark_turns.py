"""Rows that compile side by side are timed one after the other, while none compiles."""

import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

# `NAME compiles`, `NAME ready`, `NAME timed`, `NAME done` go to one log, in that order.
ROW = """
import sys, time
sys.path.append({benchmarks!r})
from rows import wait_for_turn
name, kind, compiling, timed = sys.argv[1:5]
def say(what):
    with open({log!r}, "a") as f:
        f.write(f"{{name}} {{what}}\\n")
say("compiles")
time.sleep(float(compiling))
if kind == "dies":
    say("done")
    sys.exit(3)
say("ready")
wait_for_turn(kind != "deaf" and "--wait-for-turn" in sys.argv)
say("timed")
time.sleep(float(timed))
say("done")
print("{{}}")
"""


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    """Runs rows, each NAME KIND COMPILING TIMED. Returns (exit code, log, failed)."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import run_matrix

    script, log = tmp_path / "row.py", tmp_path / "log.txt"
    script.write_text(ROW.format(benchmarks=str(BENCHMARKS), log=str(log)))

    def run(rows, *arguments):
        lines = [f"jax {script} {line.strip()}" for line in rows.strip().splitlines()]
        (tmp_path / "rows.txt").write_text("\n".join(lines))
        command = ["run_matrix", "--rows", str(tmp_path / "rows.txt")]
        command += ["--out", str(tmp_path), "--together", *arguments]
        monkeypatch.setattr("sys.argv", command)
        code = run_matrix.main()
        failed = tmp_path / "rows.failed.txt"
        said = [tuple(line.split()) for line in log.read_text().splitlines()]
        return code, said, failed.read_text() if failed.exists() else ""

    return run


def timed(said, killed=()):
    """Names in the order in which they were timed, each while nobody else worked."""
    compiling, running, names = set(), set(), []
    for name, what in said:
        if what == "compiles":
            compiling.add(name)
        elif what == "ready":
            compiling.discard(name)
        elif what == "done":
            compiling.discard(name)
            running.discard(name)
        else:
            assert not compiling, f"{name} was timed while {compiling} compiled"
            assert running <= {*killed}, f"{name} was timed beside {running}"
            running.add(name)
            names.append(name)
    return names


def test_nobody_is_timed_while_another_compiles_or_is_timed(matrix):
    rows = """
        a works 1.0 0.3
        b works 0.0 0.3
        c works 0.3 0.0
        d works 1.0 0.0
        e works 0.0 0.3
    """
    code, said, failed = matrix(rows, "--jobs", "3")
    assert (code, failed) == (0, "")
    # The list's order within what compiled at once, however soon each was ready.
    assert timed(said) == ["a", "b", "c", "d", "e"]
    # The next rows start when all that waited have been timed.
    compile_again = [said.index((name, "compiles")) for name in "de"]
    assert said.index(("c", "done")) < min(compile_again)


def test_a_row_that_dies_blocks_nobody_and_its_place_is_taken(matrix):
    rows = """
        a works 1.5 0.0
        b dies 0.0 0.0
        c works 0.0 0.0
    """
    code, said, failed = matrix(rows, "--jobs", "2")
    assert code == 1 and "exit 3" in failed
    assert timed(said) == ["a", "c"]
    # In b's place, beside a, that is still compiling: c is waited for as well.
    assert said.index(("c", "compiles")) < said.index(("a", "ready"))


def test_a_row_that_does_not_wait_is_waited_for(matrix):
    rows = """
        a deaf 0.5 0.5
        b works 0.0 0.0
    """
    code, said, _ = matrix(rows, "--jobs", "2")
    assert code == 0
    assert said.index(("a", "done")) < said.index(("b", "timed"))


def test_waiting_counts_against_nobodys_timeout(matrix):
    rows = """
        a works 0.0 60
        b works 0.0 2.0
        c works 0.0 2.0
    """
    code, said, failed = matrix(rows, "--jobs", "3", "--timeout", "4")
    assert code == 1
    assert timed(said, killed={"a"}) == ["a", "b", "c"]
    # c has waited for 6 s by then.
    assert said[-1] == ("c", "done")
    assert failed.count("timeout") == 1
    assert "row.py a" in failed


def test_a_row_without_an_answer_ends_with_a_message():
    command = [sys.executable, "-c", "import rows; rows.wait_for_turn(); print('on')"]
    process = subprocess.run(
        command,
        cwd=BENCHMARKS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (1, "ready\n")
    assert "Expected a line on standard input, the go-ahead" in process.stderr


def test_the_end_of_the_lease_ends_a_row_that_waits(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from row_process import Lease
    from row_process import run_row

    script = tmp_path / "row.py"
    script.write_text("print('ready', flush=True); input(); print('{}')")

    def turn(alive):
        while alive():
            time.sleep(0.05)

    lines = []
    failure = run_row(["jax", script], [], 60, Lease(3), lines.append, turn=turn)
    assert failure.startswith("timeout: the time of all was up before its turn came")
    assert lines == []


# Starts a process that would stay, and says which.
WITH_A_CHILD = """
import pathlib, subprocess, sys, time
command = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(float(sys.argv[2]))
"""


def gone(note):
    """Whether the process whose number is in a file ends within 10 s."""
    pid, end = int(note.read_text()), time.monotonic() + 10
    while time.monotonic() < end:
        try:
            # An orphan whose exit code nobody has read is gone too.
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("seconds, timeout", [(60, 3), (0, 60)])
def test_a_row_takes_what_it_started_with_it(monkeypatch, tmp_path, seconds, timeout):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from row_process import Lease
    from row_process import run_row

    script, note = tmp_path / "row.py", tmp_path / "pid"
    script.write_text(WITH_A_CHILD)
    row = ["jax", script, str(note), str(seconds)]
    failure = run_row(row, [], timeout, Lease(100), print)
    assert failure == ("timeout after 3 s\n" if seconds else "")
    assert gone(note)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_matrix_that_is_ended_takes_its_rows_with_it(tmp_path, number):
    script, note = tmp_path / "row.py", tmp_path / "pid"
    script.write_text(WITH_A_CHILD)
    (tmp_path / "rows.txt").write_text(f"jax {script} {note} 60\n" * 2)
    command = [sys.executable, "run_matrix.py", "--rows", tmp_path / "rows.txt"]
    process = subprocess.Popen([*command, "--out", tmp_path], cwd=BENCHMARKS)
    try:
        while not note.exists() or not note.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert gone(note)
    finally:
        process.kill()
        process.wait()
