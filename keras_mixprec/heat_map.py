"""The heat map of an inspection: layers x frames, against float16's range."""

from __future__ import annotations

import math
import pathlib
from typing import Any

# log2 of float16's smallest subnormal, and of what no longer fits.
_LOWEST, _HIGHEST = -24, 16


def draw(frames: list, kind: str, path: str | pathlib.Path) -> None:
    """Draw log2 of the largest magnitude per layer and frame into a PNG.

    Args:
        frames: List of `keras_mixprec.range_report.Frame`.
        kind: `"activation"`, `"gradient"` or `"weight_gradient"`.
        path: File to write.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing of this kind to draw.
    """
    layers = list(dict.fromkeys(p for frame in frames for p in frame.of_kind(kind)))
    if not layers:
        raise ValueError(
            f"There is no frame with ranges of this kind. Received: kind={kind!r} and "
            f"{len(frames)} frames. Train with the inspector first; kinds are "
            "'activation', 'gradient' and 'weight_gradient'."
        )
    figure, axes = _figure(len(layers), len(frames))
    values = [[_log2(f.of_kind(kind).get(layer)) for f in frames] for layer in layers]
    image = axes.imshow(
        values, cmap="viridis", vmin=_LOWEST, vmax=_HIGHEST, aspect="auto"
    )
    _mark_nonfinite(axes, frames, layers, kind)
    axes.set_yticks(range(len(layers)), layers)
    ticks = range(0, len(frames), max(1, len(frames) // 12))
    axes.set_xticks(ticks, [f"{frames[i].epoch + 1}:{frames[i].batch}" for i in ticks])
    axes.set_xlabel("epoch:batch   (x marks inf or NaN)")
    axes.set_title(f"log2 of the largest {kind.replace('_', ' ')}")
    bar = figure.colorbar(image, ticks=[_LOWEST, -14, 0, _HIGHEST])
    bar.ax.set_yticklabels(
        ["2^-24, then 0", "2^-14, subnormal", "1", "65504, then inf"]
    )
    figure.savefig(path, format="png", dpi=120)


def _figure(rows, columns) -> tuple[Any, Any]:
    # Without pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    size = (min(6 + 0.3 * columns, 30), min(2 + 0.25 * rows, 60))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _log2(r):
    return math.log2(r.max_abs) if r is not None and r.max_abs else math.nan


def _mark_nonfinite(axes, frames, layers, kind):
    marks = [
        (column, row)
        for column, frame in enumerate(frames)
        for row, layer in enumerate(layers)
        if layer in frame.of_kind(kind) and frame.of_kind(kind)[layer].nonfinite
    ]
    for column, row in marks:
        axes.text(
            column, row, "x", ha="center", va="center", color="red", weight="bold"
        )
