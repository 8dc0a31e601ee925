"""`keras-mixprec doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import click

from keras_mixprec_cli import options
from keras_mixprec_cli.keras_import import import_keras
from keras_mixprec_cli.output import console
from keras_mixprec_cli.output import print_json
from keras_mixprec_cli.output import table


@click.command(short_help="Say what this machine gains from half precision.")
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Time a matrix product in each precision.",
)
@options.as_json
def doctor(measure, as_json) -> None:
    """Say what this machine gains from half precision, and what is missing.

    Devices, versions, XLA, and the time of a matrix product in each precision, for
    the backend that KERAS_BACKEND names (tensorflow if it names none).
    """
    import_keras()
    from keras_mixprec_cli.machine import facts

    found = facts(measure)
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(table("Machine", {"what": "left", "here": "left"}, list(_machine(found))))
    out.print(_devices(found["devices"]))
    out.print(_precisions(found["precisions"]))
    out.print(found["advice"], markup=False, soft_wrap=True)
    for gap in found["missing"]:
        line = f"Missing: {gap['what']}, for {gap['for']}. {gap['do']}."
        out.print(line, markup=False, soft_wrap=True)


def _machine(found):
    yield "python", f"{found['python']} on {found['system']}"
    yield "backend", found["backend"]
    for name, version in found["versions"].items():
        yield name, version or "not installed"
    yield "XLA", found["xla"]["note"]


def _devices(devices):
    columns = dict.fromkeys(("device", "compute capability", "what"), "left")
    rows = [(d["device"], d["compute_capability"], d["name"]) for d in devices]
    return table("Devices", columns, rows)


def _precisions(rows):
    size = rows[0]["product_size"]
    title = f"Precisions: one {size} x {size} product" if size else "Precisions"
    columns = {
        "precision": "left",
        "bytes": "right",
        "ms": "right",
        "speed-up": "right",
        "what to know": "left",
    }
    return table(title, columns, [_cells(row) for row in rows])


def _cells(row):
    ms = None if row["product_ms"] is None else f"{row['product_ms']:.3g}"
    speedup = None if row["speedup"] is None else f"{row['speedup']:.2f}x"
    return row["dtype"], row["bytes"], ms, speedup, row["error"] or row["note"]
