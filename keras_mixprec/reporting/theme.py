"""Colours and type of the charts, on light and on dark pages."""

from dataclasses import dataclass
from typing import Any

# In characters: of a name in a legend, and of a line in it.
_LONGEST = 44
_LINE = 60


@dataclass(frozen=True)
class Theme:
    """Colours; the runs' are told apart by people who see few colours, too."""

    text: str
    grid: str
    background: str
    overflow: str
    runs: tuple[str, ...]


LIGHT = Theme(
    text="#1f2933",
    grid="#d9dee5",
    background="#ffffff",
    overflow="#d03801",
    runs=("#5b6673", "#0067b8", "#00855d", "#a3418b"),
)
DARK = Theme(
    text="#e4e7eb",
    grid="#3a4350",
    background="#1b222c",
    overflow="#ff8a5c",
    runs=("#a9b4c2", "#5cb3ff", "#3ddba6", "#e59ad2"),
)


def style(theme: Theme) -> dict[str, Any]:
    """Return Matplotlib's settings for a theme."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": theme.text,
        "axes.titlecolor": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 4,
    }


def finish(ax: Any, title: str, per_epoch: bool = True) -> None:
    """Give drawn axes their title, ticks and grid.

    Args:
        ax: Matplotlib axes.
        title: Their title.
        per_epoch: Whether the epochs run from left to right; else counts of steps do.
    """
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title)
    ax.set_xlabel("epoch" if per_epoch else "steps")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(True, axis="y" if per_epoch else "x", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=0)


def legend(ax: Any, side: str = "center") -> None:
    """Name what was drawn, below the axes, where it covers none of it.

    Args:
        ax: Matplotlib axes.
        side: `"center"`, or `"right"` for axes that long names push to the right.
    """
    handles, labels = ax.get_legend_handles_labels()
    labels = [
        name if len(name) < _LONGEST else f"{name[:_LONGEST]}…" for name in labels
    ]
    columns = max(1, _LINE // (max(map(len, labels)) + 6))
    place = {"loc": f"upper {side}"}
    place["bbox_to_anchor"] = (1.0 if side == "right" else 0.5, -0.2)
    ax.legend(handles, labels, ncols=min(columns, len(labels)), **place)
