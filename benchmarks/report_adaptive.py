"""What `AdaptivePrecision` did in the trainings, for docs/trainings.md."""

import statistics

from tables import BACKENDS

_FAULT = """
### A fault that comes and goes

In those trainings nothing overflows, and so no plan changes. Here the logits of an
attention layer over the digits' rows are 100,000 times too large in epochs {first} to
{last} of {epochs}, and right before and after (`benchmarks/passing_fault.py`). Float16
overflows in the logits and not in what the layer puts out: it seems calm as soon as it
is in float32. So it is tried in half once while the fault is there, and comes back for
good after twice as many calm epochs.
"""


def table(columns: tuple, lines: list) -> str:
    """Return a Markdown table.

    Args:
        columns: The headings.
        lines: Tuples of cells.
    """
    lines = [columns, ("-",) * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def settled(row: dict) -> bool:
    """Whether an adaptive run changed nothing in the last third of its epochs.

    Args:
        row: With `changes`, each beginning with its epoch, from 1.
    """
    return all(3 * epoch <= 2 * row["epochs"] for epoch, *_ in row["changes"])


def in_words(row: dict) -> str:
    """Return an adaptive run's changes.

    Args:
        row: With `changes`: epoch, layer, policy.
    """
    changes = [f"epoch {e}: {path} {to}" for e, path, to in row["changes"]]
    return "; ".join(changes) or "no change"


def verdicts(rows: list[dict], count: int) -> list[str]:
    """Say which plans changed late, and how many changed at all.

    Args:
        rows: All of the page.
        count: Int, how many adaptive runs there should be without a fault.
    """
    runs = [row for row in rows if row["adaptive"] and not _is_fault(row)]
    names = {f"{r['task']} on {BACKENDS[r['backend']]}": settled(r) for r in runs}
    late = [name for name, calm in names.items() if not calm]
    found = [
        f"{len(names)} of {count} adaptive runs; {len(names) - len(late)} of them "
        "without a change in their last third."
    ]
    if late:
        found.append(f"**Changed in the last third:** {'; '.join(late)}.")
    faults = [row for row in rows if row["adaptive"] and _is_fault(row)]
    if faults:
        changed = sum(bool(row["changes"]) for row in faults)
        calm = sum(map(settled, faults))
        found.append(
            f"Adaptive runs with a fault that comes and goes: {len(faults)}; {changed} "
            f"changed their plan, {calm} had no change in their last third."
        )
    return found


def section(rows: list[dict]) -> list[str]:
    """Return the part on the fault that comes and goes; nothing without its rows.

    Args:
        rows: Those of one device.
    """
    faults = [row for row in rows if _is_fault(row)]
    if not faults:
        return []
    (first, last), epochs = faults[0]["fault"], faults[0]["epochs"]
    columns = ("backend", "run", "each seed", "mean", "skipped steps", "changes")
    kinds = sorted(set(map(_kind, faults)))
    lines = [_line([row for row in faults if _kind(row) == kind]) for kind in kinds]
    head = _FAULT.format(first=first, last=last, epochs=epochs)
    return [head, table(columns, lines)]


def _line(rows):
    backend, run = _kind(rows[0])
    accuracies = [100 * row["accuracy"] for row in rows]
    each = ", ".join(f"{value:.2f}" for value in accuracies)
    skipped = ", ".join(str(row["skipped"]) for row in rows if "skipped" in row)
    changes = " / ".join(dict.fromkeys(in_words(r) for r in rows if r["adaptive"]))
    return backend, run, each, f"{statistics.mean(accuracies):.2f}", skipped, changes


def _kind(row):
    adaptive = ", adaptive" if row["adaptive"] else ""
    return BACKENDS[row["backend"]], row["policy"] + adaptive


def _is_fault(row):
    return row["benchmark"] == "passing_fault"
