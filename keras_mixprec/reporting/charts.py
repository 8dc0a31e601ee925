"""The charts of a report: loss, loss scale, overflows, memory, plan changes."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras_mixprec.reporting import layer_bars
from keras_mixprec.reporting.runs import Run
from keras_mixprec.reporting.runs import finite
from keras_mixprec.reporting.theme import LIGHT
from keras_mixprec.reporting.theme import Theme
from keras_mixprec.reporting.theme import finish
from keras_mixprec.reporting.theme import legend
from keras_mixprec.reporting.theme import style

# Points alone tell which epochs were logged, as long as they do not form a line.
_MOST_MARKERS = 40
_MEMORY = {
    "gpu_memory_peak_mb": "GPU memory, peak of the epoch",
    "gpu_memory_mb": "GPU memory at the end of the epoch",
    "host_memory_mb": "Host memory of the process",
}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: File name without its ending.
        title: What is drawn.
        note: One sentence on how to read it.
        draw: Draws into Matplotlib axes, given a theme.
        per_epoch: Whether the epochs are drawn from left to right.
    """

    name: str
    title: str
    note: str
    draw: Callable[[Any, Theme], None]
    per_epoch: bool = True


def charts(runs: list[Run]) -> list[Chart]:
    """Return the charts that the runs have logs for."""
    found = []
    if any("loss" in run.logs for run in runs):
        note = "Dashed: on validation data. NaN and inf leave a gap."
        found.append(Chart("loss", "Loss", note, lambda ax, t: _loss(ax, runs, t)))
    if any(run.matching("loss_scale") for run in runs):
        note = "At the end of each epoch; crossed out where steps overflowed in it."
        found.append(
            Chart("loss_scale", "Loss scale", note, lambda ax, t: _scale(ax, runs, t))
        )
    if any(run.matching("overflow_count") for run in runs):
        note = "Steps skipped in each epoch because a gradient overflowed."
        found.append(
            Chart("overflows", "Overflows", note, lambda ax, t: _counts(ax, runs, t))
        )
    if any(run.all_overflows.steps for run in runs):
        note = (
            "Skipped steps by the layer in which their overflow began, nearest the "
            "loss first; at the top those whose loss was not finite already."
        )
        found.append(
            Chart(
                "overflow_layers",
                "Where overflows began",
                note,
                lambda ax, t: layer_bars.draw(ax, runs, t),
                per_epoch=False,
            )
        )
    key = next((k for k in _MEMORY if any(k in run.logs for run in runs)), None)
    if key:
        found.append(
            Chart(
                "memory",
                _MEMORY[key],
                "In MiB. Runs in one process share what the earlier ones left.",
                lambda ax, t: _memory(ax, runs, t, key),
            )
        )
    if any("tensor_core_util" in run.logs for run in runs):
        note = "Percent of the epoch. Dashed: the time in which any kernel ran."
        found.append(
            Chart(
                "tensor_cores", "Tensor cores", note, lambda ax, t: _busy(ax, runs, t)
            )
        )
    if any("float32_layers" in run.logs for run in runs):
        note = "At the end of each epoch; a diamond where the plan changed."
        found.append(
            Chart("plan", "Layers in float32", note, lambda ax, t: _plan(ax, runs, t))
        )
    return found


def draw_one(chart: Chart, theme: Theme, file_format: str = "svg") -> bytes:
    """Return one chart, without its title, as a picture."""
    return _picture([chart], 1, theme, file_format, titles=False)


def draw_all(charts: list[Chart], theme: Theme = LIGHT) -> bytes:
    """Return all charts in one PNG, in two columns."""
    return _picture(charts, min(2, len(charts)), theme, "png", titles=True)


def _picture(charts, columns, theme, file_format, titles):
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context({**style(theme), "svg.hashsalt": charts[0].name}):
        figure = Figure(figsize=(4.6 * columns, 3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for chart, ax in zip(charts, axes, strict=False):
            chart.draw(ax, theme)
            finish(ax, chart.title if titles else "", chart.per_epoch)
        for ax in axes[len(charts) :]:
            ax.set_axis_off()
        file = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {}
        figure.savefig(file, format=file_format, dpi=110, metadata=metadata)
    return file.getvalue()


def _loss(ax, runs, theme):
    drawn = []
    for i, run in enumerate(runs):
        for key, dashes in (("loss", "-"), ("val_loss", "--")):
            if key in run.logs:
                label = run.label if key == "loss" else None
                values = _line(ax, run.logs[key], _color(theme, i), label, dashes)
                drawn += finite(values)
    if drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    legend(ax)


def _scale(ax, runs, theme):
    drawn = []
    for i, run in enumerate(runs):
        for key, scales in run.matching("loss_scale").items():
            label = _label(run, key, "loss_scale")
            drawn += finite(_line(ax, scales, _color(theme, i), label))
            counts = run.logs.get(key.removesuffix("loss_scale") + "overflow_count", {})
            _cross_out(ax, {e: s for e, s in scales.items() if counts.get(e)}, theme)
    _log2(ax, [v for v in drawn if v > 0])
    legend(ax)


def _cross_out(ax, points, theme):
    style = {"color": theme.overflow, "markeredgewidth": 2.2}
    style["markersize"] = 9 if len(points) <= _MOST_MARKERS else 4
    # Named once, however many runs overflowed.
    named = "overflow" in ax.get_legend_handles_labels()[1]
    label = "_" if named or not points else "overflow"
    ax.plot(list(points), list(points.values()), "x", label=label, **style)


def _log2(ax, scales):
    if scales:
        ax.set_yscale("log", base=2)
        # Room around a scale that never moves.
        ax.set_ylim(min(scales) / 2.5, max(scales) * 2.5)


def _counts(ax, runs, theme):
    from matplotlib.ticker import MaxNLocator

    series = [
        (_label(run, key, "overflow_count"), counts, _color(theme, i))
        for i, run in enumerate(runs)
        for key, counts in run.matching("overflow_count").items()
    ]
    width = 0.8 / len(series)
    for i, (label, counts, color) in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * width
        places = [e + shift for e in counts]
        ax.bar(places, counts.values(), width, color=color, linewidth=0, label=label)
    ax.set_ylim(0, max(1, *(max(c.values()) for _, c, _ in series)) * 1.15)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(ax)


def _memory(ax, runs, theme, key):
    for i, run in enumerate(runs):
        if key in run.logs:
            _line(ax, run.logs[key], _color(theme, i), run.label)
    ax.set_ylim(0, 1.15 * ax.get_ylim()[1])
    ax.set_ylabel("MiB")
    legend(ax)


def _busy(ax, runs, theme):
    for i, run in enumerate(runs):
        for key, dashes in (("tensor_core_util", "-"), ("gpu_util", "--")):
            if key in run.logs:
                label = run.label if key == "tensor_core_util" else None
                _line(ax, run.logs[key], _color(theme, i), label, dashes)
    ax.set_ylim(0, 105)
    ax.set_ylabel("percent")
    legend(ax)


def _plan(ax, runs, theme):
    from matplotlib.ticker import MaxNLocator

    for i, run in enumerate(runs):
        layers = run.logs.get("float32_layers", {})
        changes = run.logs.get("precision_changes", {})
        color = _color(theme, i)
        places, counts = list(layers), list(layers.values())
        ax.plot(places, counts, color=color, label=run.label, drawstyle="steps-mid")
        changed = [epoch for epoch in layers if changes.get(epoch)]
        heights = [layers[epoch] for epoch in changed]
        ax.plot(changed, heights, "D", color=color, markersize=6, label="_")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(ax)


def _line(ax, values, color, label, style="-"):
    marker = "o" if len(values) <= _MOST_MARKERS else ""
    heights = [v if math.isfinite(v) else math.nan for v in values.values()]
    ax.plot(list(values), heights, style, color=color, label=label, marker=marker)
    return heights


def _color(theme, i):
    return theme.runs[i % len(theme.runs)]


def _label(run, key, suffix):
    optimizer = key.removesuffix(suffix).rstrip("_")
    return f"{run.label}, {optimizer}" if optimizer else run.label
