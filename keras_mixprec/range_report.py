"""Frames of an inspection: what to read, what to keep, what to look at."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from keras_mixprec import ranges
from keras_mixprec.ranges import Range

KINDS = ("activation", "gradient", "weight_gradient")
# Shares of zeros; ReLU and dropout together make 0.75 of them.
_VANISHED, _PRESENT = 0.95, 0.5
_SHARES = ("nonfinite", "beyond", "to_zero", "subnormal", "zero")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What one training step looked like.

    Args:
        epoch: Int, from 0.
        batch: Int, from 0.
        loss_scale: The loss scale that the step's gradients carry.
        ranges: `(layer path, kind) -> Range`, in the order of the forward pass. Kinds
            are `"activation"`, `"gradient"` of that activation and
            `"weight_gradient"`, both scaled, as float16 sees them.
    """

    epoch: int
    batch: int
    loss_scale: float
    ranges: dict[tuple[str, str], Range]

    @property
    def overflowed(self) -> bool:
        """Whether a gradient of a weight is not finite: the step was skipped."""
        return any(
            r.nonfinite for (_, k), r in self.ranges.items() if k == "weight_gradient"
        )

    def of_kind(self, kind: str) -> dict[str, Range]:
        """Return layer path -> `Range` of one kind, in the order of the forward pass.

        Args:
            kind: One of `"activation"`, `"gradient"`, `"weight_gradient"`.
        """
        return {path: r for (path, k), r in self.ranges.items() if k == kind}

    def culprit(self) -> tuple[str, str] | None:
        """Return the layer where float16's range is left first, and how.

        Forward before backward, since what is not finite forward is not finite
        backward either: the first layer whose outputs are inf, NaN or beyond
        float16; else the layer nearest the loss in whose backward pass gradients
        turn inf or NaN; else the one nearest the loss whose gradients underflow.
        """
        for path, r in self.of_kind("activation").items():
            if r.overflows:
                return path, f"activations overflow ({_describe(r)})"
        return self.backward_overflow() or self._underflow()

    def backward_overflow(self) -> tuple[str, str] | None:
        """Return the layer nearest the loss in whose backward pass gradients overflow.

        It need not have weights: what it hands on overflows in the layer before it.

        Returns:
            Its path, or `"the loss"`, and how; `None` if all gradients are finite.
        """
        gradients, weights = self.of_kind("gradient"), self.of_kind("weight_gradient")
        after = "the loss"
        for path in reversed([*gradients]):
            # A gradient arrives from the layer after; those of weights arise inside.
            if gradients[path].nonfinite:
                return after, f"the gradient of its input overflows, at '{path}'"
            if path in weights and weights[path].nonfinite:
                what = _describe(weights[path])
                return path, f"gradients of its weights overflow ({what})"
            after = path
        overflowing = (p for p, r in weights.items() if r.nonfinite)
        path = next(overflowing, None)
        return path and (path, "gradients of its weights overflow")

    def _underflow(self):
        gradients, weights = self.of_kind("gradient"), self.of_kind("weight_gradient")
        after = None
        for path in reversed(list(dict.fromkeys([*gradients, *weights]))):
            for r in (gradients.get(path), weights.get(path)):
                if r is not None and r.underflows:
                    return path, f"gradients underflow ({_describe(r)})"
            r = gradients.get(path)
            # In float16 what underflowed is 0 already.
            if after is not None and r is not None and _vanishes(r, after):
                what = f"{r.zero} of {r.values} values are 0"
                return path, f"gradients vanish: underflow, or cut off ({what})"
            after = r or after
        return None


class RangeReport:
    """The frames that an `OverflowInspector` looked at.

    Args:
        frames: List of `Frame`, oldest first.
    """

    def __init__(self, frames: list[Frame]):
        self.frames = list(frames)

    def __str__(self) -> str:
        return "\n\n".join(map(self.table, range(len(self.frames))))

    def table(self, index: int = -1) -> str:
        """Return one frame as a table with a heading that names the culprit.

        Args:
            index: Int, which frame. Defaults to the last.
        """
        frame = self.frames[index]
        names = [f"{path} {kind}" for path, kind in frame.ranges]
        width = max(map(len, [*names, "layer"]))
        head = f"{'layer':<{width}}  {'max abs':>9} {'min abs':>9}" + "".join(
            f" {name:>9}" for name in ("inf/NaN", ">65504", "-> 0", "subnormal", "0")
        )
        rows = [
            f"{name:<{width}}  {_number(r.max_abs)} {_number(r.min_abs)}"
            + "".join(f" {r.share(field):>9.2%}" for field in _SHARES)
            for name, r in zip(names, frame.ranges.values(), strict=True)
        ]
        return "\n".join([self._heading(frame), head, *rows])

    def _heading(self, frame):
        culprit = frame.culprit()
        what = f"'{culprit[0]}': {culprit[1]}" if culprit else "all in range"
        return (
            f"Epoch {frame.epoch + 1}, batch {frame.batch}, loss scale "
            f"{frame.loss_scale:g}: {what}"
        )

    def to_dict(self) -> dict[str, list]:
        """Return columns of equal length: `pandas.DataFrame(report.to_dict())`."""
        rows = [
            {
                "epoch": frame.epoch,
                "batch": frame.batch,
                "loss_scale": frame.loss_scale,
                "layer": path,
                "kind": kind,
                **dataclasses.asdict(r),
                **{f"{field}_share": r.share(field) for field in _SHARES},
            }
            for frame in self.frames
            for (path, kind), r in frame.ranges.items()
        ]
        return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """Return `to_dict` as JSON.

        Args:
            path: File to write it to as well. Defaults to none.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            pathlib.Path(path).write_text(text)
        return text

    def log2_ranges(self, kind: str = "activation") -> list[list[float]]:
        """Return log2 of the largest magnitude: per frame a list over layers.

        Args:
            kind: As in `Frame.of_kind`.
        """
        return [
            [math.log2(r.max_abs) for r in frame.of_kind(kind).values() if r.max_abs]
            for frame in self.frames
        ]

    def to_tensorboard(self, log_dir: str | pathlib.Path) -> None:
        """Write histograms of `log2_ranges` below `mixed_precision/` for TensorBoard.

        Args:
            log_dir: Folder of the run. The step is the number of the frame.

        Raises:
            ImportError: If the `tensorboard` extra is not installed.
        """
        from keras_mixprec.tensorboard import Board

        board = Board(log_dir)
        for kind in KINDS:
            for step, values in enumerate(self.log2_ranges(kind)):
                board.histogram(f"log2_max_abs/{kind}", values, step)
        board.close()

    def heat_map(self, path: str | pathlib.Path, kind: str = "activation") -> None:
        """Draw layers x frames as a PNG: log2 of max abs in float16's range.

        Args:
            path: File to write.
            kind: As in `Frame.of_kind`. Defaults to `"activation"`.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is nothing of this kind to draw.
        """
        from keras_mixprec.heat_map import draw

        draw(self.frames, kind, path)


def _vanishes(r, after):
    return r.share("zero") > _VANISHED and after.share("zero") < _PRESENT


def _describe(r):
    if r.overflows:
        return (
            f"{r.nonfinite + r.beyond} of {r.values} values beyond {ranges.LARGEST:g}"
        )
    return f"{r.to_zero} of {r.values} values become 0, {r.subnormal} subnormal"


def _number(value):
    return f"{'-':>9}" if value is None else f"{value:>9.3g}"
