"""Run processes of one job side by side, with a deadline, and leave none behind."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent


class Processes:
    """Python processes of one job, killed when the `with` block ends.

    Args:
        script: Path of the script, relative to the repository.
        arguments: List with the list of arguments of each process.
        environments: List with the extra environment of each. Defaults to none.
        deadline: Float, seconds until `wait` gives up. Defaults to 120.
    """

    def __init__(self, script, arguments, environments=None, deadline=120):
        self.script = str(ROOT / script)
        self.arguments = arguments
        self.environments = environments or [{}] * len(arguments)
        self.deadline = deadline
        self.ends = time.monotonic() + deadline
        self.processes = []

    def __enter__(self):
        stack = self.stack = contextlib.ExitStack()
        self.files = []
        for arguments, extra in zip(self.arguments, self.environments, strict=True):
            file = stack.enter_context(tempfile.TemporaryFile("w+"))
            self.files.append(file)
            self.processes.append(self._start(arguments, extra, file))
        return self

    def _start(self, arguments, extra, file):
        paths = [str(ROOT), str(TESTS), str(TESTS / "distributed")]
        defaults = {
            "PYTHONPATH": os.pathsep.join(paths),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "OMP_NUM_THREADS": "1",
            "DEADLINE": str(self.deadline),
        }
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", self.script, *map(str, arguments)],
            env=os.environ | defaults | extra,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, which=None):
        """Wait until the deadline. Returns the exit codes; `None` for one that hangs.

        Args:
            which: List of the indices to wait for. Defaults to all.
        """
        which = range(len(self.processes)) if which is None else which
        return [self._wait_for(self.processes[i]) for i in which]

    def _wait_for(self, process):
        try:
            return process.wait(max(self.ends - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return None

    def kill(self, index):
        """End one process as a machine that fails would: at once."""
        self.processes[index].kill()

    def output(self, index):
        """Return what a process has printed so far, errors included."""
        self.files[index].seek(0)
        return self.files[index].read()

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                # With whatever it started itself: the session is its own.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.stack.close()


def run(script, arguments, environments=None, deadline=120):
    """Run a job to its end. Returns the output of each process.

    Raises:
        AssertionError: If a process fails, or hangs past the deadline.
    """
    with Processes(script, arguments, environments, deadline) as job:
        codes = job.wait()
        outputs = [job.output(i) for i in range(len(codes))]
    failed = [
        f"process {i} ended with {code}:\n{outputs[i][-4000:]}"
        for i, code in enumerate(codes)
        if code != 0
    ]
    assert not failed, "\n".join(failed)
    return outputs


def free_ports(number):
    """Return ports of the loopback interface that nothing listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
