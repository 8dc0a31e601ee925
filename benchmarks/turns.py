"""Whose turn it is to be timed, of rows that run side by side.

Rows compile all at once and are timed one after the other. A row that says `ready`
waits until none compiles any more; then all that wait have their turn, and only after
the last of them the next rows start. So each batch of rows compiles together, and
nothing is timed beside anything that works.
"""

import threading
from collections.abc import Callable


class Turns:
    """The parent's side of `rows.wait_for_turn`, for one thread per row.

    Args:
        jobs: Int, rows at a time.
        rows: Int, how many there are in all.
    """

    def __init__(self, jobs: int, rows: int):
        self._jobs, self._to_start = jobs, rows
        self._compiling, self._waiting = set(), set()
        self._timed, self._timing = None, False
        self._changed = threading.Condition()

    def start(self, row: int) -> None:
        """Wait until a row may start, and so compile.

        Args:
            row: Int, its place in the list.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._timing)
            self._to_start -= 1
            self._compiling.add(row)

    def wait(self, row: int, alive: Callable[[], bool]) -> None:
        """Wait until a row that is ready may be timed, the first in the list first.

        Args:
            row: Int, its place in the list.
            alive: Says whether its process still runs: one that does not has no turn.
        """
        with self._changed:
            self._compiling.discard(row)
            self._waiting.add(row)
            self._changed.notify_all()
            while not self._may_be_timed(row):
                if not alive():
                    return
                # Nobody tells when a process ends while its row waits.
                self._changed.wait(0.2)
            self._waiting.discard(row)
            self._timed, self._timing = row, True

    def end(self, row: int) -> None:
        """Let the others go on: the row's process has ended, however it did.

        Args:
            row: Int, its place in the list.
        """
        with self._changed:
            self._compiling.discard(row)
            self._waiting.discard(row)
            if self._timed == row:
                self._timed = None
            if self._timed is None and not self._waiting:
                self._timing = False
            self._changed.notify_all()

    def _may_be_timed(self, row):
        nobody = not self._compiling and self._timed is None
        return nobody and row == min(self._waiting) and not self._one_may_start()

    def _one_may_start(self):
        # A row that is about to start will compile: it is waited for as well.
        running = len(self._compiling) + len(self._waiting)
        return not self._timing and self._to_start > 0 and running < self._jobs
