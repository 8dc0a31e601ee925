"""The processes of one measurement: started together, watched, none left behind."""

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from row_process import ended_by_signal

# Seconds for the others to say what they have to, once one has failed.
_GRACE = 3.0


def run(
    command: list[str],
    environments: list[dict[str, str]],
    timeout: float,
    turn: Callable[[], None],
) -> list[str]:
    """Run one process per environment. Returns the lines that the first one printed.

    A process that prints `ready` waits for a line on its standard input. Once all of
    them do, `turn` is called, and each gets its line when it returns: on the host, so
    that no GPU waits in a collective beside what others time.

    Args:
        command: List of strings, the same for all.
        environments: What each adds to this process's variables.
        timeout: Float, seconds for all of them, those inside `turn` not counted.
        turn: Called without arguments.

    Raises:
        RuntimeError: If a process fails, or time is up. It says what each said last.
    """
    said, heard = queue.Queue(), []
    with ended_by_signal(), contextlib.ExitStack() as stack:
        members = [_started(command, env, stack) for env in environments]
        for rank, member in enumerate(members):
            threading.Thread(
                target=member.listen, args=[rank, said], daemon=True
            ).start()
        end, ready, running = time.monotonic() + timeout, set(), len(members)
        while running:
            try:
                rank, line = said.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise _error(members, f"no end after {timeout:g} s") from None
            if line is None:
                running -= 1
                if members[rank].process.wait():
                    _let_end(members)
                    raise _error(members, f"process {rank} failed")
            elif line.strip() != "ready":
                heard += [line] if rank == 0 else []
            else:
                ready.add(rank)
                if len(ready) == len(members):
                    end += _seconds(turn)
                    for member in members:
                        member.go()
    return heard


def _seconds(turn):
    start = time.monotonic()
    turn()
    return time.monotonic() - start


class _Member:
    """One process, with all that it says."""

    def __init__(self, process, errors):
        self.process, self.errors = process, errors

    def listen(self, rank, said):
        # The output is closed under it where the job is over before the process is.
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                said.put((rank, line))
        said.put((rank, None))

    def go(self):
        with contextlib.suppress(BrokenPipeError):
            # Past the buffer, which would hold a line that nobody takes any more.
            os.write(self.process.stdin.fileno(), b"go\n")

    def last_words(self):
        self.errors.seek(0)
        return "\n".join(self.errors.read().splitlines()[-12:])


def _started(command, env, stack):
    with contextlib.ExitStack() as inner:
        errors = inner.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        process = inner.enter_context(
            subprocess.Popen(
                command,
                env=os.environ | env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        )
        inner.callback(process.kill)
        stack.push(inner.pop_all())
    return _Member(process, errors)


def _let_end(members):
    # Whoever failed first may not be the first that is seen to have ended.
    end = time.monotonic() + _GRACE
    for member in members:
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(max(0.0, end - time.monotonic()))


def _error(members, what):
    parts = [f"Expected a row from {len(members)} process(es). Received: {what}."]
    for rank, member in enumerate(members):
        code = member.process.poll()
        state = "still ran" if code is None else f"exit {code}"
        if code != 0:
            parts.append(f"process {rank}, {state}:\n{member.last_words()}")
    return RuntimeError("\n".join(parts))
