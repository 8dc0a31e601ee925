"""One HTML page that needs nothing but a browser, and the charts as PNG."""

import base64
import datetime
import importlib
import importlib.resources
import os
import pathlib
from typing import Any

import keras

from keras_mixprec.reporting import charts
from keras_mixprec.reporting.runs import Run
from keras_mixprec.reporting.runs import read_runs
from keras_mixprec.reporting.theme import DARK
from keras_mixprec.reporting.theme import LIGHT
from keras_mixprec.reporting.verdict import judge

# A longer plan is folded up.
_OPEN_ROWS = 24


def report(
    run: Any,
    output: str | os.PathLike | None = None,
    title: str = "Mixed precision training",
) -> pathlib.Path:
    """Write what half precision did to a run as a page and as pictures.

    Loss, loss scale, overflows and the layers in which they began, memory and, where
    they were logged, tensor cores; the verdict in words; the plan where it is known.

    The folder gets `report.html`, which loads nothing from anywhere and follows the
    reader's light or dark mode, `curves.png` with all charts, and one PNG for each.

    Example:

    ```python
    history = model.fit(x, y, callbacks=[mp.MixedPrecisionMonitor()])
    mp.report(history)
    mp.report({"float32": before, "mixed_float16": history}, "comparison")
    ```

    Args:
        run: `keras.callbacks.History` (or its `history`); a dict of label -> those,
            drawn side by side; or the path of a run folder: each `*.csv` in it that
            `keras.callbacks.CSVLogger` wrote, and each `*.jsonl` with one JSON object
            per epoch (`MixedPrecisionMonitor(json_lines=...)`), is a run. A run's plan
            is `<name>.plan.json` beside it; that of a `History` its model's, as it is
            now. Where overflows began is known where a `MixedPrecisionMonitor` ran,
            and not from CSV files.
        output: Folder to write into, created if absent. Defaults to the run folder,
            or to `mixprec-report` in the working directory.
        title: Heading of the page.

    Returns:
        The path of `report.html`.

    Raises:
        TypeError: If `run` is none of these.
        ValueError: If it holds no epoch.
        ImportError: If the `report` extra is not installed.
    """
    runs = read_runs(run)
    _require("matplotlib", "jinja2")
    folder = pathlib.Path(output or (run if _is_path(run) else "mixprec-report"))
    folder.mkdir(parents=True, exist_ok=True)
    drawn = charts.charts(runs)
    _write_pictures(folder, drawn)
    page = folder / "report.html"
    page.write_text(_render(title, runs, drawn), encoding="utf-8")
    return page


def _require(*modules):
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"`report` needs {' and '.join(modules)}. Received: no module "
                f"'{name}'. Install them with `pip install 'keras-mixprec[report]'`."
            ) from error


def _is_path(run):
    return isinstance(run, str | os.PathLike)


def _write_pictures(folder, drawn):
    if drawn:
        (folder / "curves.png").write_bytes(charts.draw_all(drawn))
    for chart in drawn:
        picture = charts.draw_one(chart, LIGHT, "png")
        (folder / f"{chart.name}.png").write_bytes(picture)


def _render(title, runs, drawn):
    import jinja2

    source = importlib.resources.files("keras_mixprec.reporting").joinpath("page.html")
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).from_string(source.read_text(encoding="utf-8"))
    return page.render(
        title=title,
        verdicts=judge(runs),
        pictures=[_embed(chart) for chart in drawn],
        labels=[run.label for run in runs],
        rows=_last_epoch(runs),
        plans=[_table(run) for run in runs if run.plan is not None],
        origin=_origin(),
    )


def _embed(chart):
    light, dark = (
        base64.b64encode(charts.draw_one(chart, theme)).decode()
        for theme in (LIGHT, DARK)
    )
    return {"title": chart.title, "note": chart.note, "light": light, "dark": dark}


def _table(run):
    plan = run.plan
    counts = ", ".join(f"{n} {policy}" for policy, n in plan.counts().items())
    return {
        "label": run.label,
        "counts": f"{len(plan)} layers: {counts}",
        "shares": f"In half precision: {plan.half_share('parameters'):.1%} of the "
        f"parameters, {plan.half_share('multiply_adds'):.1%} of the multiply-adds.",
        "rows": plan.rows,
        "open": len(plan) <= _OPEN_ROWS,
    }


def _last_epoch(runs: list[Run]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for run in runs for key in run.logs)
    return [(key, [_format(run.last(key)) for run in runs]) for key in keys]


def _format(value):
    if value is None:
        return "–"
    if abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}"


def _origin():
    import keras_mixprec

    return (
        f"keras_mixprec {keras_mixprec.__version__}, Keras {keras.__version__} on "
        f"{keras.backend.backend()}, {datetime.date.today().isoformat()}"
    )
