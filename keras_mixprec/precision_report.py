"""`PrecisionReport`: what `compare_precision` saw, as a table, a dict or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os

from keras_mixprec.precision_plan import HALF

_HEAD = ("layer", "class", "policy", "own error", "inherited", "total", "max abs")


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The errors of one layer's outputs. Relative ones are ratios of L2 norms.

    Args:
        path: As in `mp.plan`.
        layer_class: Name of the layer's class.
        policy: Name of the dtype policy it was measured in.
        own_error: Relative error of the layer fed with the reference's inputs, the
            layers inside it exact; `None` if it cannot be called alone.
        inherited_error: Relative error that inputs alone bring: the layer in the
            reference's precision, fed with what reached it in the other; `None`
            likewise.
        error: Relative error of its outputs in the whole run.
        max_abs_error: Largest difference in the whole run, where finite.
        nonfinite: Values that are inf or NaN where the reference is finite.
    """

    path: str
    layer_class: str
    policy: str
    own_error: float | None
    inherited_error: float | None
    error: float
    max_abs_error: float
    nonfinite: int


@dataclasses.dataclass(frozen=True)
class PrecisionReport:
    """One model in two precisions: same weights, same inputs. Prints as a table.

    Args:
        model: Name of the model.
        policy: The half policy that was measured.
        reference: The policy it was compared with.
        samples: Int, number of examples.
        relative_error: L2 norm of the outputs' difference over that of the
            reference's outputs; inf if anything is not finite that should be, NaN
            if the reference has no finite output.
        max_abs_error: Largest difference of an output, where finite.
        nonfinite: Outputs that are inf or NaN where the reference is finite.
        agreement: Share of examples with the same argmax over the last axis; of one
            number per example in [0, 1], the same side of 0.5; `None` for others.
        layers: One `LayerError` per layer, in the order of completion.
    """

    model: str
    policy: str
    reference: str
    samples: int
    relative_error: float
    max_abs_error: float
    nonfinite: int
    agreement: float | None
    layers: list[LayerError]

    def __getitem__(self, path: str) -> LayerError:
        """Return the row of a layer."""
        for row in self.layers:
            if row.path == path:
                return row
        raise KeyError(
            f"Expected the path of a layer. Received: {path!r}. The paths are "
            f"{[row.path for row in self.layers]}."
        )

    def culprit(self) -> LayerError | None:
        """Return the layer that is most to blame, `None` if none computes in half.

        The first whose own outputs are inf or NaN; else the one with the largest own
        error.
        """
        rows = [r for r in self.layers if r.policy in HALF and r.own_error is not None]
        lost = next((r for r in rows if math.isinf(r.own_error)), None)
        known = [r for r in rows if not math.isnan(r.own_error)]
        return lost or max(known, key=lambda r: r.own_error, default=None)

    def __str__(self) -> str:
        worst = self.culprit()
        cells = [_HEAD, *(_cells(row, row is worst) for row in self.layers)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in map(tuple, cells)
        ]
        return "\n".join([self._heading(), *lines])

    def _heading(self):
        agreement = "-" if self.agreement is None else f"{self.agreement:.2%}"
        return (
            f"{self.model}: {self.policy} against {self.reference}, {self.samples} "
            f"examples: relative error {self.relative_error:.2e}, max abs error "
            f"{self.max_abs_error:.2e}, {self.nonfinite} not finite, agreement "
            f"{agreement}"
        )

    def to_dict(self) -> dict:
        """Return plain values, the layers as a list of dicts."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Return `to_dict` as JSON; infinite errors are written as `Infinity`.

        Args:
            path: File to write it to as well. Defaults to none.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text


def _cells(row, is_worst):
    errors = (row.own_error, row.inherited_error, row.error, row.max_abs_error)
    numbers = ["-" if e is None else f"{e:.2e}" for e in errors]
    numbers[0] += " <--" if is_worst else ""
    return (row.path, row.layer_class, row.policy, *numbers)
