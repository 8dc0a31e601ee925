"""Where `MixedPrecisionMonitor` writes to on request: TensorBoard, and JSON lines."""

from __future__ import annotations

import numbers
import os

import keras

from keras_mixprec.attribution import Attribution
from keras_mixprec.present import present_plan
from keras_mixprec.present import present_policy
from keras_mixprec.run_record import JsonLines
from keras_mixprec.run_record import plan_path
from keras_mixprec.tensorboard import Board


class Outputs:
    """The files of one training, and the plan it was trained with.

    Args:
        json_lines: File for one JSON object per epoch, or `None`. The plan of a model
            that computes in half precision goes beside it, into `<name>.plan.json`.
        log_dir: TensorBoard's folder, or `None`.
    """

    def __init__(
        self, json_lines: str | os.PathLike | None, log_dir: str | os.PathLike | None
    ):
        self._lines = JsonLines(json_lines) if json_lines is not None else None
        self._board = Board(log_dir) if log_dir is not None else None
        self._has_plan = False

    def epoch(
        self,
        model: keras.Model,
        epoch: int,
        logs: dict[str, float],
        own: dict[str, float],
        where: Attribution | None,
    ) -> None:
        """Write an epoch.

        Args:
            model: The model, built by now.
            epoch: Int, from 0.
            logs: All that was logged.
            own: What of it is the monitor's.
            where: Where the epoch's overflows began, or `None` if there were none.
        """
        if self._lines:
            self._lines.write(epoch, logs, where)
            if not self._has_plan:
                self._save_plan(model)
        if self._board:
            began = where.began if where else {}
            own = own | {f"overflow_count/{path}": n for path, n in began.items()}
            if where and where.nonfinite_loss is not None:
                own["nonfinite_loss_count"] = where.nonfinite_loss
            self._board.scalars(own, epoch)
            self._board.flush()

    def batch(self, values: dict[str, float], step: int) -> None:
        """Write what was read between two batches, for TensorBoard alone.

        Args:
            values: Name -> number.
            step: Int, training steps so far.
        """
        if self._board:
            self._board.scalars({f"batch_{k}": v for k, v in values.items()}, step)

    def close(self, model: keras.Model) -> None:
        """Write what is left: the plan anew, which may have changed in training."""
        if self._has_plan:
            self._save_plan(model)
        if self._board:
            self._board.close()

    def _save_plan(self, model):
        if present_policy(model) is None:
            return
        path = plan_path(self._lines.path)
        # A reader sees the old one or the new one.
        part = path.with_suffix(".part")
        present_plan(model).to_json(part)
        part.replace(path)
        self._has_plan = True


def batches_between(update_freq: int | str) -> int | None:
    """Return every how many batches to write, `None` for at the end of epochs only."""
    if update_freq == "epoch":
        return None
    is_count = isinstance(update_freq, numbers.Integral) and update_freq >= 1
    if not is_count or isinstance(update_freq, bool):
        raise ValueError(
            "`update_freq` must be 'epoch' or an integer >= 1. Received: "
            f"update_freq={update_freq!r}. Pass for example 100, batches."
        )
    return int(update_freq)
