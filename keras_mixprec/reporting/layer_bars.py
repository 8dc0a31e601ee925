"""The chart of the layers in which overflows began."""

import os
from typing import Any

from keras_mixprec.reporting.runs import Run
from keras_mixprec.reporting.theme import Theme
from keras_mixprec.reporting.theme import legend

# Rows and, of a layer's path, characters that a chart has room for.
_ROWS = 8
_LONGEST = 26
LOSS = "the loss itself"


def draw(ax: Any, runs: list[Run], theme: Theme) -> None:
    """Draw for each layer and run the steps whose overflow began there.

    Args:
        ax: Matplotlib axes.
        runs: The runs, at least one with overflows.
        theme: The colours.
    """
    counts = [(i, run.label, _steps(run)) for i, run in enumerate(runs)]
    counts = [row for row in counts if row[2]]
    rows = _rows([steps for _, _, steps in counts])
    height = 0.8 / len(counts)
    for place, (i, label, steps) in enumerate(counts):
        shift = (place - (len(counts) - 1) / 2) * height
        places = [y + shift for y in range(len(rows))]
        widths = [sum(steps.get(path, 0) for path in paths) for _, paths in rows]
        color = theme.runs[i % len(theme.runs)]
        bars = ax.barh(places, widths, height, color=color, linewidth=0, label=label)
        ax.bar_label(bars, [f"{w:,}" if w else "" for w in widths], padding=3)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.12)
    legend(ax, "right")


def _steps(run):
    where = run.all_overflows
    losses = {LOSS: where.nonfinite_loss} if where.nonfinite_loss else {}
    return losses | where.began


def _rows(counts):
    """Return name -> the layers in it: those with the most, then all the others."""
    paths = list(dict.fromkeys(path for steps in counts for path in steps))
    # The loss first, whichever run lost steps to it.
    paths.sort(key=lambda path: path != LOSS)
    others = []
    if len(paths) > _ROWS:
        total = {p: sum(steps.get(p, 0) for steps in counts) for p in paths}
        kept = set(sorted(paths, key=total.get, reverse=True)[: _ROWS - 1])
        others = [p for p in paths if p not in kept]
        paths = [p for p in paths if p in kept]
    rows = [(name, [p]) for name, p in zip(_names(paths), paths, strict=True)]
    return [*rows, (f"{len(others)} others", others)] if others else rows


def _names(paths):
    """Return what there is room for of each path: its end, or where it differs."""
    ends = [_short(path) for path in paths]
    names = []
    for path, end in zip(paths, ends, strict=True):
        alike = [p for p, other in zip(paths, ends, strict=True) if other == end]
        names.append(end if len(alike) == 1 else _from_difference(path, alike))
    return names


def _short(path):
    return path if len(path) <= _LONGEST else f"…{path[1 - _LONGEST :]}"


def _from_difference(path, alike):
    common = os.path.commonprefix(alike)
    # From the beginning of the word that differs.
    start = max(common.rfind("/"), common.rfind("_", 0, -1)) + 1
    name = f"{'…' if start else ''}{path[start:]}"
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
