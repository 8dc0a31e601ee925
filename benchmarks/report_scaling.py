"""The part of docs/benchmarks.md about several GPUs, from the rows of `scaling.py`."""

import collectives
import tables

_HEAD = """
### Several GPUs

`benchmarks/scaling.py`: TensorFlow's `MirroredStrategy` without XLA on any number of
GPUs, one included, since it compiles for one alone; JAX's `DataParallel`; torch's
DistributedDataParallel, eager. mixed_float16, the batch per GPU kept. TensorFlow's
batches come from the host. Efficiency: the step on one GPU over the step on all.
Overflows: one forced on each GPU in turn, counted once, with every GPU's copy of
weights and slots finite and as it was (25 November: the same bits on all).

"Deterministic": with `TF_DETERMINISTIC_OPS=1`. Without it TensorFlow adds up the rows
of an embedding's gradient (`IndexedSlices`) in no fixed order on a GPU
([TensorFlow 2.8](https://github.com/tensorflow/tensorflow/releases/tag/v2.8.0)), so
that the copies of a table may part; "copies parted" says by how much after training,
where it was looked at.
"""
_MODEL_HEAD = """
### Several GPUs: what agreeing costs, predicted and seen

"Own all-reduce" is what one more all-reduce, of one scalar, would cost by the latency
model of [scaling.md](scaling.md), which this library does not make. "Seen" is what loss
scaling adds to the step on all GPUs less what it adds on one, also of the step: a
difference of four medians, whose blocks stand in brackets above.
"""


def sections(rows: list[dict]) -> list[str]:
    """Return the tables of one device and run, in a list; empty without rows.

    Args:
        rows: Those of `scaling.py`, with `benchmark` "scaling".
    """
    if not rows:
        return []
    ways = list(tables.SCALINGS)
    # By what is compared, so that what differs in one thing stands together.
    order = sorted(
        rows, key=lambda r: (_kind(r), r["devices"], ways.index(r["scaling"]))
    )
    order = [row | compared(row, rows) for row in order]
    found = [_HEAD, tables.table(order, _COLUMNS)]
    agreed = [row for row in order if "seen_us" in row]
    return found + ([_MODEL_HEAD, tables.table(agreed, _AGREED)] if agreed else [])


def compared(row: dict, rows: list[dict]) -> dict:
    """Return how a row stands against its siblings, as far as they were measured.

    `efficiency` and `against_none` are ratios; `predicted_us` and `seen_us` are
    microseconds, `predicted_percent` and `seen_percent` those of the row's step.

    Args:
        row: One row.
        rows: It and all that may be compared with it.
    """
    ms = {
        (r["scaling"], r["devices"]): r["ms_per_step"]
        for r in rows
        if _kind(r) == _kind(row)
    }
    way, many, own = row["scaling"], row["devices"], row["ms_per_step"]
    found = {}
    if ("none", many) in ms and way != "none":
        found["against_none"] = own / ms["none", many]
    if many == 1:
        return found
    predicted = collectives.predict(many, own)
    found["predicted_us"] = predicted["own_all_reduce_us"]
    found["predicted_percent"] = predicted["own_all_reduce_percent"]
    if (way, 1) in ms:
        found["efficiency"] = ms[way, 1] / own
    if way != "none" and {(way, 1), ("none", 1), ("none", many)} <= ms.keys():
        added = (own - ms["none", many]) - (ms[way, 1] - ms["none", 1])
        found["seen_us"] = 1000 * added
        found["seen_percent"] = 100 * added / own
    return found


def _kind(row):
    keys = ("model", "size", "batch", "backend", "xla", "policy")
    return *(row[key] for key in keys), row.get("deterministic", False)


def _backend(row):
    fixed = ", deterministic" if row.get("deterministic") else ""
    return f"{tables.backend(row)}{fixed}"


def _model(row):
    small = "" if row["size"] == "full" else ", small stand-in"
    return f"{tables.MODELS.get(row['model'], row['model'])}{small}, {row['batch']}"


def _time(row):
    # Of fewer blocks a median says nothing.
    return tables.time(row) if row["blocks"] > 2 else ""


def _measured(row):
    return f"{row['blocks']} x {row['steps_per_block']}, {row['date']}"


def _percentage(row, field):
    return f"{100 * row[field]:.1f}%" if field in row else ""


def _added(row, name, digits, sign=""):
    if f"{name}_us" not in row:
        return ""
    time = f"{row[f'{name}_us']:{sign}.{digits}f}"
    return f"{time} us ({row[f'{name}_percent']:{sign}.2f}%)"


def _memory(row):
    of = "" if row["memory_of"] == "device" else " (host)"
    return ", ".join(f"{peak:.0f}" for peak in row["peak_memory_mb_each"]) + of


def _parted(row):
    if row.get("copies_parted") is None:
        return ""
    return row["copies_parted"] or "no"


_FIRST = {
    "model, batch": _model,
    "backend": _backend,
    "GPUs": lambda row: str(row["devices"]),
    "loss scaling": tables.scaling,
}
_COLUMNS = _FIRST | {
    "ms per step": _time,
    "efficiency": lambda row: _percentage(row, "efficiency"),
    "against none": lambda row: tables.percent(row, "against_none"),
    "peak memory of each, MiB": _memory,
    "blocks x steps, day": _measured,
    "overflows survived": lambda row: row["overflows_survived"] or "",
    "copies parted": _parted,
}
_AGREED = _FIRST | {
    "own all-reduce": lambda row: _added(row, "predicted", 1),
    "seen": lambda row: _added(row, "seen", 0, "+"),
}
