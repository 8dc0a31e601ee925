"""`BenchmarkResult`: what `benchmark` saw, as a table, JSON or a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator

_COLUMNS = {
    "policy": "{}",
    "ms_per_step": "{:.2f}",
    "speedup": "{:.2f}x",
    "samples_per_s": "{:.0f}",
    "peak_memory_mb": "{:.0f}",
    "compile_s": "{:.1f}",
    "loss": "{:.4g}",
    "loss_difference": "{:.1%}",
}


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
    """One policy. What was not measured is `None`.

    Args:
        policy: Name of the dtype policy.
        ms_per_step: Milliseconds per train step, the median of the timed blocks.
        ms_min: That of the fastest block.
        ms_max: That of the slowest block.
        samples_per_s: Samples per second, at the median.
        compile_s: Seconds of the first step, tracing and compilation included.
        peak_memory_mb: MiB at the peak on all devices; where there is no accelerator,
            resident memory of the process. `None` if a policy before had the same
            peak or a higher one and the backend cannot reset it (JAX).
        loss: Mean loss of the last timed block.
        skipped_steps: Steps that overflowed and were skipped.
        speedup: Step time of the first policy over this one's.
        loss_difference: |loss - first policy's loss| / |first policy's loss|.
        error: Why there are no figures: `"out of memory"`, or what was raised.
    """

    policy: str
    ms_per_step: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    samples_per_s: float | None = None
    compile_s: float | None = None
    peak_memory_mb: float | None = None
    loss: float | None = None
    skipped_steps: int | None = None
    speedup: float | None = None
    loss_difference: float | None = None
    error: str | None = None

    def compared(self, first: BenchmarkRow) -> BenchmarkRow:
        """Return this row with what it takes two rows to know."""
        if self.error or first.error:
            return self
        difference = abs(self.loss - first.loss)
        return dataclasses.replace(
            self,
            speedup=first.ms_per_step / self.ms_per_step,
            # The tiny number: a loss of exactly zero agrees with itself.
            loss_difference=difference / max(abs(first.loss), 1e-12),
        )


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """What `benchmark` saw. Iterable over its rows; prints as a table.

    Args:
        model: Name of the model.
        backend: Keras's backend.
        device: The devices it ran on.
        batch_size: Samples per step.
        steps: Train steps per policy, the first and the warm-up included.
        date: ISO date.
        versions: Package -> version.
        rows: One `BenchmarkRow` per policy, in the order asked for.
    """

    model: str
    backend: str
    device: str
    batch_size: int
    steps: int
    date: str
    versions: dict[str, str]
    rows: list[BenchmarkRow]

    def __iter__(self) -> Iterator[BenchmarkRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, policy: str) -> BenchmarkRow:
        """Return the row of a policy."""
        for row in self.rows:
            if row.policy == policy:
                return row
        raise KeyError(
            f"Expected one of {[row.policy for row in self.rows]}. "
            f"Received: {policy!r}. Name it in `policies=` to measure it."
        )

    def __str__(self) -> str:
        head = (
            f"{self.model}: batch {self.batch_size}, {self.backend}, {self.device}, "
            f"{self.date}"
        )
        cells = [tuple(_COLUMNS), *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(_pad, line, widths)).rstrip() for line in cells]
        errors = [f"{row.policy}: {row.error}" for row in self.rows if row.error]
        skips = [
            f"{row.policy}: {row.skipped_steps} of {self.steps} steps skipped"
            for row in self.rows
            if row.skipped_steps
        ]
        return "\n".join([head, *table, *errors, *skips])

    __repr__ = __str__

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Return the result as JSON, and write it to a file if one is named.

        Args:
            path: File to write, or None.

        Returns:
            The JSON text.
        """
        fields = dataclasses.asdict(self)
        fields["rows"] = [_finite(row) for row in fields["rows"]]
        text = json.dumps(fields, indent=1, allow_nan=False)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike) -> BenchmarkResult:
        """Return the result that `to_json` wrote.

        Args:
            source: The JSON text, or the file that holds it.
        """
        text = str(source)
        if not text.lstrip().startswith("{"):
            with open(source, encoding="utf-8") as file:
                text = file.read()
        fields = json.loads(text)
        rows = [BenchmarkRow(**row) for row in fields.pop("rows")]
        return cls(**fields, rows=rows)

    def to_png(self, path: str | os.PathLike) -> None:
        """Draw step time and peak memory per policy. Needs matplotlib.

        Args:
            path: The PNG file to write.

        Raises:
            ImportError: If matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "`to_png` needs matplotlib. Received: no such package. Install it "
                "with `pip install keras_mixprec[report]`."
            ) from error
        # No pyplot: its state and its windows are the caller's.
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        times, memory = figure.subplots(1, 2)
        self._bars(times, "ms_per_step", "ms per train step")
        self._bars(memory, "peak_memory_mb", "peak memory, MiB")
        figure.suptitle(f"{self.model}, batch {self.batch_size}, {self.device}")
        figure.savefig(path, format="png", dpi=150)

    def _bars(self, axes, field, title):
        values = [getattr(row, field) for row in self.rows]
        bars = axes.barh([row.policy for row in self.rows], [v or 0 for v in values])
        labels = [
            _format(_COLUMNS[field], v) if v is not None else row.error or "not known"
            for v, row in zip(values, self.rows, strict=True)
        ]
        axes.bar_label(bars, labels, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(title)


def _finite(row):
    """JSON has no NaN."""
    kept = {k: v for k, v in row.items() if isinstance(v, (int, str)) or _is_finite(v)}
    return dict.fromkeys(row) | kept


def _is_finite(value):
    return value is not None and math.isfinite(value)


def _cells(row):
    return tuple(_format(form, getattr(row, name)) for name, form in _COLUMNS.items())


def _format(form, value):
    return "-" if value is None else form.format(value)


def _pad(cell, width):
    return cell.ljust(width) if cell[0].isalpha() else cell.rjust(width)
