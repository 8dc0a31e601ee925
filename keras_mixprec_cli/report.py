"""`keras-mixprec report`: a run's curves as one page and as pictures."""

from __future__ import annotations

import dataclasses
import pathlib

import click

from keras_mixprec_cli import options
from keras_mixprec_cli.keras_import import import_keras
from keras_mixprec_cli.output import console
from keras_mixprec_cli.output import print_json
from keras_mixprec_cli.output import table

_SHOWN = ("loss", "val_loss", "loss_scale", "overflow_total", "gpu_memory_peak_mb")


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--output",
    metavar="FOLDER",
    help="Folder to write into.  [default: the run's own folder]",
)
@click.option(
    "--title",
    default="Mixed precision training",
    show_default=True,
    help="Heading of the page.",
)
@options.as_json
def report(run, output, title, as_json) -> None:
    """Draw what half precision did to a run, and say what it means.

    RUN is a folder with logs: *.csv as `keras.callbacks.CSVLogger` writes them, or
    *.jsonl with one JSON object per epoch, as `MixedPrecisionMonitor(json_lines=...)`
    does, with the plan beside it in *.plan.json. Each file is a curve. Writes
    report.html, which needs nothing but a browser, and PNG pictures.
    """
    path = pathlib.Path(run)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        hint = f": keras-mixprec report {path.parent}" if path.exists() else ""
        raise click.ClickException(
            f"'{run}' {what}. Expected the folder that CSVLogger wrote into{hint}."
        )
    import_keras()
    from keras_mixprec.reporting.page import report as write_report
    from keras_mixprec.reporting.runs import read_runs
    from keras_mixprec.reporting.verdict import judge

    page = write_report(run, output, title)
    read = read_runs(run)
    runs = {r.label: {key: r.last(key) for key in r.logs} for r in read}
    verdicts = judge(read)
    if as_json:
        said = [dataclasses.asdict(verdict) for verdict in verdicts]
        print_json({"page": str(page), "runs": runs, "verdicts": said})
        return
    keys = [key for key in _SHOWN if any(key in logs for logs in runs.values())]
    rows = [
        (label, *(_short(logs.get(k)) for k in keys)) for label, logs in runs.items()
    ]
    columns = {"run": "left"} | dict.fromkeys(keys, "right")
    console().print(table("Last epoch", columns, rows))
    for verdict in verdicts:
        console().print(f"{verdict.level}: {verdict.text}", markup=False)
    console().print(f"Wrote {page}", markup=False)


def _short(value):
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
