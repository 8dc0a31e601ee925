"""Cells and tables of the pages that show benchmark rows."""

from collections.abc import Callable

MODELS = {
    "bert": "BERT-base",
    # What `bert` was until positions became one table for all samples.
    "bert-lookup": "BERT-base, positions looked up by each sample",
    "resnet": "ResNet-50",
    "dlrm": "Recommender (DLRM-style)",
    "mlp": "MLP",
}
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}
SCALINGS = {
    "none": "no loss scaling",
    "keras": "Keras's wrapper",
    "unscaled": "keras_mixprec, no loss scaling",
    "fixed": "a fixed scale, unchecked",
    "mp": "keras_mixprec",
    "mp+monitor": "keras_mixprec and monitor",
}


def table(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """Return a Markdown table.

    Args:
        rows: What to show, one line each.
        columns: Heading -> function of a row: the cell.
    """
    lines = [" | ".join(columns), " | ".join("-" for _ in columns)]
    lines += [" | ".join(cell(row) for cell in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def backend(row: dict) -> str:
    """Return the backend, and whether it compiles."""
    if row["benchmark"] == "peers":
        return row["backend"]
    compiled = {"tensorflow": ("no XLA", "XLA"), "torch": ("eager", "torch.compile")}
    pair = compiled.get(row["backend"])
    return f"{row['backend']}, {pair[row['xla']]}" if pair else row["backend"]


def scaling(row: dict) -> str:
    """Return what scales the loss."""
    return SCALINGS.get(row["scaling"], row["scaling"])


def time(row: dict) -> str:
    """Return the median of the blocks, with the fastest and the slowest."""
    return f"{row['ms_per_step']:.2f} ({row['ms_min']:.2f} to {row['ms_max']:.2f})"


def percent(row: dict, field: str) -> str:
    """Return by how much a ratio is above 1; nothing where there is none."""
    return f"{100 * (row[field] - 1):+.1f}%" if field in row else ""


def times(row: dict, field: str) -> str:
    """Return a ratio; nothing where there is none."""
    return f"{row[field]:.2f}x" if field in row else ""


def memory(row: dict) -> str:
    """Return the peak, and whether it is the host's."""
    of = "" if row.get("memory_of") == "device" else " (host)"
    return f"{row['peak_memory_mb']:.0f}{of}"
