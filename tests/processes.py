"""Run processes of one job side by side, with a deadline, and leave none behind."""

import contextlib
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
# Seconds for the others to end by themselves once one process has failed.
GRACE = 20
_RESERVED = []


def search_path(*first):
    """Return a `PYTHONPATH`: these folders, then what this process was given."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, first), *([before] if before else [])])


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
        paths = [ROOT, TESTS, TESTS / "distributed"]
        defaults = {
            "PYTHONPATH": search_path(*paths),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "OMP_NUM_THREADS": "1",
            # XLA on CPUs has a thread for each device or core, and a device that waits
            # for others holds one: without some to spare, split weights hang at times.
            "NPROC": "32",
            "DEADLINE": str(self.deadline),
            # Says where it stands when `_wait_for` aborts it.
            "PYTHONFAULTHANDLER": "1",
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
            # With a traceback of every thread, also of one that waits in an import.
            process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return None

    def wait_unless_one_fails(self):
        """Wait for all; once one has failed, `GRACE` seconds longer for the others.

        Those that wait for it to join would do so for minutes, and say nothing.
        """
        while any(p.poll() is None for p in self.processes):
            if any(p.poll() for p in self.processes):
                self.ends = min(self.ends, time.monotonic() + GRACE)
                break
            if time.monotonic() > self.ends:
                break
            time.sleep(0.05)
        return self.wait()

    def kill(self, index):
        """End one process as a machine that fails would: at once."""
        self.processes[index].kill()

    def output(self, index):
        """Return what a process has printed so far, errors included."""
        self.files[index].seek(0)
        # Without the list, longer than all the rest, that ends Python's own traceback.
        lines = self.files[index].read().splitlines(keepends=True)
        return "".join(x for x in lines if not x.startswith("Extension modules:"))

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
        codes = job.wait_unless_one_fails()
        outputs = [job.output(i) for i in range(len(codes))]
    failed = [
        f"process {i} ended with {code}:\n{outputs[i][-4000:]}"
        for i, code in enumerate(codes)
        if code != 0
    ]
    assert not failed, "\n".join(failed)
    return outputs


def free_ports(number):
    """Return ports of the loopback interface that nobody else gets until we end.

    Two jobs on one port do not fail: gRPC shares it between them (SO_REUSEPORT), and
    processes join the wrong job or wait for ever. So ports are not those that the
    kernel gives to whoever asks for any, which are free again before a job listens.
    """
    found = []
    while len(found) < number:
        port = 10_000 + secrets.randbelow(_first_ephemeral_port() - 10_000)
        with socket.socket() as tcp:
            # The UDP port of the same number is the lock: it is in nobody's way.
            udp = socket.socket(type=socket.SOCK_DGRAM)
            try:
                udp.bind(("127.0.0.1", port))
                tcp.bind(("127.0.0.1", port))
            except OSError:
                udp.close()
                continue
        _RESERVED.append(udp)
        found.append(port)
    return found


def _first_ephemeral_port():
    path = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(path.read_text().split()[0]) if path.exists() else 32_768
    return first if first > 11_000 else 32_768
