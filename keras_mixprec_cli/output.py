"""What a command prints: a table for people, or JSON for programs; errors, one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import click

# Wide enough for layer paths in a file or a pipe, where no terminal says its width.
_WIDTH_OF_A_PIPE = 160


def console(stderr: bool = False):
    """Return a rich console on standard output, or on standard error."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH_OF_A_PIPE
    return Console(file=stream, width=width, highlight=False)


def table(title: str | None, columns: dict[str, str], rows: Sequence[Sequence[Any]]):
    """Return a rich table.

    Args:
        title: Heading, or `None`.
        columns: Heading of each column -> `"left"` or `"right"`.
        rows: Cells; `None` prints as a dash.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, side in columns.items():
        made.add_column(name, justify=side, overflow="fold")
    for row in rows:
        # Text, not markup: a layer may be called "[bold]".
        made.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    return made


def print_json(value: Any) -> None:
    """Print one JSON value on standard output; what is not finite becomes null."""
    click.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def one_line(error: BaseException) -> str:
    """Return what an exception says, as one line."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, Warning)):
        return text
    return f"{type(error).__name__}: {text}"
