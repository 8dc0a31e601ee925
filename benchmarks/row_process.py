"""One row of a matrix in a process of its own, with all that it starts."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent

# Processes that share one GPU take what they need of its memory, not all of it.
_SHARED = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "OMP_NUM_THREADS": "2",
}


class Lease:
    """The time that all rows have together, and the processes that run in it.

    Args:
        seconds: Float, from now on.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.running = set()
        self._lock = threading.Lock()

    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self.end - time.monotonic())

    @contextlib.contextmanager
    def holds(self, process: subprocess.Popen):
        """Inside, `stop` ends this process too; at the end nothing is left of it."""
        with self._lock:
            self.running.add(process)
        try:
            yield
        finally:
            # Also what a process leaves behind that ended by itself.
            kill_group(process)
            with self._lock:
                self.running.discard(process)

    def stop(self) -> None:
        """End all that runs, and let nothing start any more."""
        with self._lock:
            self.end = 0.0
            for process in self.running:
                kill_group(process)


@contextlib.contextmanager
def ended_by_signal():
    """Inside, SIGTERM and SIGHUP end this process as errors do: no child is left."""

    def leave(number, frame):
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _Limit:
    """Kills a row when its time is up, which stands still while it waits."""

    def __init__(self, process, seconds, lease):
        self.process, self.left, self.lease = process, seconds, lease
        self.late, self.timer = "", None
        self._arm(f"timeout after {min(seconds, lease.left()):g} s")

    def _arm(self, why, waits=False):
        self.started = time.monotonic()
        left = self.lease.left()
        seconds = left if waits else min(self.left, left)
        self.timer = threading.Timer(seconds, self._kill, [why])
        self.timer.daemon = True
        self.timer.start()

    def _kill(self, why):
        self.late = self.late or why
        kill_group(self.process)

    @contextlib.contextmanager
    def paused(self):
        self.stop()
        self.left = max(0.0, self.left - (time.monotonic() - self.started))
        self._arm("timeout: the time of all was up before its turn came", waits=True)
        yield
        self.stop()
        self._arm(f"timeout, {self.left:.0f} s after its turn came")

    def stop(self):
        self.timer.cancel()


def run_row(
    row: list[str],
    extra: list[str],
    timeout: float,
    lease: Lease,
    keep: Callable[[str], None],
    shared: bool = False,
    turn: Callable | None = None,
) -> str:
    """Run one row. Returns why it failed: empty if it did not.

    Args:
        row: Backend, script and arguments.
        extra: Arguments to add.
        timeout: Float, seconds, those in which it waits for its turn not counted.
        lease: The `Lease` in which it runs.
        keep: Called with each of its JSON lines as it comes.
        shared: Whether other rows run beside it. Defaults to `False`.
        turn: Called when the row says that it is ready, with a function that says
            whether it still runs; the row goes on when it returns. Defaults to `None`:
            the row is not asked to wait.
    """
    script, *arguments = row[1:]
    command = [sys.executable, str(HERE / script), *arguments, *extra]
    command += ["--wait-for-turn"] if turn else []
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command,
            env=_environment(row[0], shared),
            stdin=subprocess.PIPE if turn else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            # What the row starts must end with it.
            start_new_session=True,
        ) as process,
        lease.holds(process),
    ):
        limit = _Limit(process, timeout, lease)
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    keep(line)
                elif turn and line.strip() == "ready" and not process.stdin.closed:
                    with limit.paused():
                        turn(lambda: process.poll() is None)
                    _go(process)
            process.wait()
        finally:
            limit.stop()
        said.seek(0)
        tail = "\n".join(said.read().splitlines()[-40:])
    if limit.late:
        return f"{limit.late}\n{tail}"
    return f"exit {process.returncode}\n{tail}" if process.returncode else ""


def _environment(backend, shared):
    root = str(HERE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = (_SHARED if shared else {}) | os.environ
    env |= {"KERAS_BACKEND": backend, "PYTHONPATH": path}
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return env


def _go(process):
    with contextlib.suppress(BrokenPipeError):
        # Past the buffer, which would hold a line that nobody takes any more.
        os.write(process.stdin.fileno(), b"go\n")
    # A row that waits a second time is told so by the end of the input.
    process.stdin.close()
