"""What a run leaves for its report beside the numbers in its logs."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
from typing import Any

from keras_mixprec.attribution import Attribution

_logger = logging.getLogger("keras_mixprec")
# The name under which `MixedPrecisionMonitor` leaves with a `keras.callbacks.History`
# where overflows began: a dict of epoch, counted from 0 -> `Attribution`.
ATTRIBUTE = "mixed_precision_overflows"


class JsonLines:
    """A file with one JSON object per epoch and line.

    Each line is `{"epoch": 0, <logs>, "overflows": {...}}`, with `overflows` as
    `Attribution` has it, in epochs with overflows only. Numbers that JSON lacks are
    `"NaN"`, `"Infinity"` and `"-Infinity"`, as in Protocol Buffers' JSON.

    Args:
        path: File to append to; its folder is created if absent.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)

    def write(self, epoch: int, logs: dict[str, Any], where: Attribution | None):
        """Append one epoch: at once, on a line of its own.

        Args:
            epoch: Int, from 0.
            logs: The logs of the epoch; what is no number is left out.
            where: Where its overflows began, or `None` if there were none.
        """
        row = {"epoch": epoch} | {k: _strict(v) for k, v in logs.items()}
        if where is not None:
            row["overflows"] = dataclasses.asdict(where)
        line = json.dumps({k: v for k, v in row.items() if v is not None})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # What an earlier run was killed in the middle of stays a line of its own.
            start = b"" if _ends_a_line(file) else b"\n"
            # In one call, so that no reader sees half a line.
            file.write(start + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _ends_a_line(file):
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_json_lines(path: pathlib.Path) -> list[dict]:
    """Return the objects of a JSON lines file, without one that was torn off.

    Args:
        path: The file.

    Raises:
        ValueError: If a line is something else.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows += _row(path, number, line)
    return rows


def _row(path, number, line):
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        if line.startswith("{"):
            _logger.warning(
                "Line %d of '%s' is left out: a run was killed while it wrote it.",
                *(number, path),
            )
            return []
        row = None
    if not isinstance(row, dict):
        raise ValueError(
            f"Expected one JSON object in each line of '{path}'. Received: "
            f"{line[:40]!r} in line {number}. Remove the line, or the file."
        )
    return [row]


def plan_path(log: pathlib.Path) -> pathlib.Path:
    """Return the file of the plan that belongs to a file of logs."""
    return log.with_suffix(".plan.json")


def _strict(value):
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    if math.isfinite(value):
        return int(value) if value.is_integer() else value
    return "NaN" if math.isnan(value) else ("-" if value < 0 else "") + "Infinity"
