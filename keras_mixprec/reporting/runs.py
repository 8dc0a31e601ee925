"""What a run logged: read from a `History`, from several, or from a folder."""

import csv
import math
import os
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import keras

from keras_mixprec.attribution import Attribution
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.present import present_plan
from keras_mixprec.present import present_policy
from keras_mixprec.run_record import ATTRIBUTE
from keras_mixprec.run_record import plan_path
from keras_mixprec.run_record import read_json_lines


@dataclass(frozen=True)
class Run:
    """The logs of one run.

    Attributes:
        label: What the run is called in the report.
        logs: Key -> epoch, counted from 1 -> value.
        steps_per_epoch: Training steps of an epoch, or `None` where unknown.
        overflows: Epoch, counted from 1 -> where its overflows began, where known.
        plan: The plan it was trained with, or `None` where unknown or all float32.
    """

    label: str
    logs: dict[str, dict[int, float]]
    steps_per_epoch: int | None = None
    overflows: dict[int, Attribution] = field(default_factory=dict)
    plan: PrecisionPlan | None = None

    @property
    def all_overflows(self) -> Attribution:
        """Where the overflows of the whole run began, as far as known."""
        return sum(self.overflows.values(), Attribution({}, {}, None))

    def last(self, key: str) -> float | None:
        """Return the value of the last epoch that logged `key`, or `None`."""
        values = list(self.logs.get(key, {}).values())
        return values[-1] if values else None

    def matching(self, suffix: str) -> dict[str, dict[int, float]]:
        """Return the logs of `suffix`, and of `<optimizer>_<suffix>` where several."""
        return {
            key: values
            for key, values in self.logs.items()
            if key == suffix or key.endswith(f"_{suffix}")
        }


def read_runs(run: Any) -> list[Run]:
    """Return what `run` holds, in its order.

    Args:
        run: As for `keras_mixprec.reporting.report`.

    Raises:
        TypeError: If `run` is none of these.
        ValueError: If it holds no epoch.
    """
    if isinstance(run, str | os.PathLike):
        runs = _read_folder(pathlib.Path(run))
    elif isinstance(run, Mapping) and all(map(_is_run, run.values())):
        runs = [_from_history(str(label), value) for label, value in run.items()]
    elif _is_run(run):
        runs = [_from_history("run", run)]
    else:
        raise TypeError(
            "`run` must be a `History` as `model.fit` returns it, a dict of label -> "
            f"`History`, or the path of a folder with logs. Received: run={run!r} "
            f"of type {type(run).__name__}."
        )
    if not any(values for r in runs for values in r.logs.values()):
        raise ValueError(
            f"`run` holds no epoch to report. Received: run={run!r}. Train for one "
            "epoch at least, or pass the folder that `CSVLogger` wrote into."
        )
    return runs


def _is_run(value):
    if isinstance(value, keras.callbacks.History):
        return True
    return isinstance(value, Mapping) and all(
        isinstance(v, list | tuple) for v in value.values()
    )


def _from_history(label, history):
    logs = getattr(history, "history", history)
    longest = max(map(len, logs.values()), default=0)
    epochs = [e + 1 for e in getattr(history, "epoch", range(longest))]
    steps = (getattr(history, "params", None) or {}).get("steps")
    return Run(
        label,
        {k: _by_epoch(epochs, v) for k, v in logs.items()},
        steps,
        {e + 1: where for e, where in getattr(history, ATTRIBUTE, {}).items()},
        _plan_of(getattr(history, "model", None)),
    )


def _plan_of(model):
    # The model as it is now; nothing else remembers what it was trained in.
    known = isinstance(model, keras.Model) and present_policy(model) is not None
    return present_plan(model) if known else None


def _by_epoch(epochs, values):
    # With `validation_freq=n` Keras logs the val_* keys every n-th epoch only.
    stride = max(1, len(epochs) // max(1, len(values)))
    pairs = zip(epochs[stride - 1 :: stride], values, strict=False)
    return {epoch: float(value) for epoch, value in pairs}


def _read_folder(folder):
    paths = [*folder.glob("*.csv"), *folder.glob("*.jsonl")]
    if not paths:
        raise ValueError(
            "A run folder must hold logs as `keras.callbacks.CSVLogger` writes them "
            f"(*.csv), or one JSON object per epoch and line (*.jsonl). Received: "
            f"'{folder}', {'without any' if folder.is_dir() else 'no folder'}."
        )
    return [
        _from_rows(path.stem, _read_rows(path), _read_plan(path))
        for path in sorted(paths)
    ]


def _read_rows(path: pathlib.Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    with path.open(newline="", encoding="utf-8") as file:
        separator = csv.Sniffer().sniff(file.readline(), ",;\t|").delimiter
        file.seek(0)
        return list(csv.DictReader(file, delimiter=separator))


def _read_plan(path):
    own = plan_path(path)
    return PrecisionPlan.from_json(own) if own.exists() else None


def _from_rows(label, rows, plan):
    logs: dict[str, dict[int, float]] = {}
    overflows: dict[int, Attribution] = {}
    for i, row in enumerate(rows):
        epoch = int(row.get("epoch", i)) + 1
        overflows.pop(epoch, None)
        if isinstance(row.get("overflows"), dict):
            overflows[epoch] = Attribution(**row["overflows"])
        for key, value in row.items():
            number = _number(value)
            if key != "epoch" and number is not None:
                # An epoch run again after a restart replaces its first attempt.
                logs.setdefault(key, {})[epoch] = number
    return Run(label, logs, overflows=overflows, plan=plan)


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):  # `CSVLogger` writes "NA" for a missing value.
        return None


def finite(values: Iterable[float]) -> list[float]:
    """Return those of `values` that are neither NaN nor infinite."""
    return [v for v in values if math.isfinite(v)]
