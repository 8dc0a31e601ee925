"""`AdaptivePrecision`: the plan follows what training does to the ranges."""

from __future__ import annotations

import functools
import logging
import math
import os

import keras

from keras_mixprec.backend import engine
from keras_mixprec.callbacks.order import stand_first
from keras_mixprec.callbacks.scout import Scout
from keras_mixprec.convert import convert
from keras_mixprec.hardware import has_bfloat16
from keras_mixprec.hysteresis import Hysteresis
from keras_mixprec.hysteresis import HysteresisRule
from keras_mixprec.hysteresis import PrecisionChange
from keras_mixprec.precision_plan import HALF
from keras_mixprec.present import present_plan
from keras_mixprec.recompile import change_in_training
from keras_mixprec.trouble import Counters
from keras_mixprec.trouble import largest_outputs

_logger = logging.getLogger("keras_mixprec")


class AdaptivePrecision(keras.callbacks.Callback):
    """Move layers out of float16 that overflow again and again, and back when calm.

    At the end of each epoch it reads the optimizer's overflow counts, which are free,
    and the ranges of the epoch's first batch, measured as `OverflowInspector` does. An
    epoch is troubled if activations of that batch overflow, or if more than
    `max_overflow_share` of its steps, and more than one, were skipped; in the epoch
    after such a one it looks at every batch until one overflows, to see where. After
    `patience` troubled epochs in a row the layer to blame changes its policy.

    A layer that it moved comes back after `calm_epochs` epochs without trouble and
    with `headroom` between its outputs and 65504. If it has to leave again it must be
    calm for twice as long, one troubled epoch is enough to send it back, and nothing
    comes back in the last third of a run, nor in the two epochs before it: so the plan
    settles. Only a layer that is troubled there for the first time still leaves there.
    Each change takes place between two epochs, which compiles the train step once more,
    keeps the optimizer's state, and is logged. An `OverflowInspector` in the same run
    shares what is compiled to measure.

    The logs get `float32_layers`, the number of layers that are in float32, and
    `precision_changes`, those of this epoch; `mp.report` draws both, and `plot` which
    layer changed when.

    Example:

    ```python
    adaptive = mp.AdaptivePrecision()
    model.fit(x, y, epochs=30, callbacks=[adaptive])
    adaptive.changes
    adaptive.plot("precision.png")
    ```

    Args:
        patience: Int >= 1, troubled epochs in a row before a layer leaves. Defaults
            to `2`.
        calm_epochs: Int >= 1, calm epochs before it comes back. Defaults to `5`.
        headroom: Float >= 1, what 65504 must be over the largest output of a layer
            that comes back. Defaults to `16.0`.
        max_overflow_share: Float in [0, 1], the share of an epoch's steps that the
            search for the loss scale may cost. Defaults to `0.05`.
        fallback: Where layers go: `"float32"`, `"mixed_bfloat16"` (float32's range at
            half its size), or `"auto"`, which is the latter where the hardware
            computes in it. Defaults to `"float32"`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        patience: int = 2,
        calm_epochs: int = 5,
        headroom: float = 16.0,
        max_overflow_share: float = 0.05,
        fallback: str = "float32",
    ):
        super().__init__()
        _check(patience, calm_epochs, headroom, max_overflow_share, fallback)
        self.max_overflow_share, self.fallback = max_overflow_share, fallback
        self.changes: list[PrecisionChange] = []
        self._rule = HysteresisRule(int(patience), int(calm_epochs), headroom)
        self._hysteresis = Hysteresis(self._rule)
        self._scout = Scout()
        self._counters: Counters | None = None

    def set_params(self, params: dict) -> None:
        """Take the parameters of the run, as Keras hands them out."""
        super().set_params(params)
        self._scout.set_params(params)

    def set_model(self, model: keras.Model) -> None:
        """Take the model, and the first place in the list of callbacks."""
        super().set_model(model)
        self._scout.set_model(model)
        stand_first(self)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forget earlier runs.

        Raises:
            ValueError: If this is one of several replicas, whose plans would part.
        """
        if not engine.sees_whole_loss(self.model):
            raise ValueError(
                "`AdaptivePrecision` must see the whole batch: on a share of it, each "
                "replica would change a plan of its own. Received: a model that trains "
                "on several replicas. Find a plan on one device, with "
                "`mp.calibrate(model, x, y)`, and pass it to `mp.convert(model, "
                "plan=plan)` on each."
            )
        self.changes = []
        self._hysteresis = Hysteresis(self._rule)
        self._scout.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Note where the optimizers' counters stand."""
        self._scout.on_epoch_begin(epoch, logs)
        self._counters = Counters(self.model)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Have the coming batch measured, or not."""
        self._scout.on_train_batch_begin(batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Read ranges and counts; change the plan if they ask for it."""
        self._scout.on_epoch_end(epoch, logs)
        frames = self._scout.take_frames()
        plan = present_plan(self.model)
        policies = {row.path: row.policy for row in plan}
        half = {path for path, name in policies.items() if name in HALF}
        blamed = self._counters.blamed(frames, half, self.max_overflow_share)
        epochs = self.params.get("epochs") or math.inf
        changes = self._hysteresis.after_epoch(
            epoch, epochs, policies, blamed, largest_outputs(frames), self._fallback
        )
        self._scout.hunting = blamed is not None and not changes
        self._carry_out(plan, changes)
        if logs is not None:
            logs["float32_layers"] = _in_float32(plan)
            logs["precision_changes"] = len(changes)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leave the train function as it was."""
        self._scout.on_train_end(logs)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw when which layer was in which policy, as a PNG.

        Args:
            path: File to write.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing was ever changed.
        """
        from keras_mixprec.reporting.changes import draw

        draw(self.changes, int(self.params.get("epochs") or 0), path)

    # -- changes --------------------------------------------------------------------

    def _fallback(self, policy):
        if self.fallback == "float32" or policy == "mixed_bfloat16":
            return "float32"
        usable = self.fallback == "mixed_bfloat16" or has_bfloat16()
        return "mixed_bfloat16" if usable else "float32"

    def _carry_out(self, plan, changes):
        for one in changes:
            plan[one.path].policy = one.after
            plan[one.path].reason = f"adaptive: {one.reason}"
            _logger.warning(
                "Epoch %d: layer '%s' goes from %s to %s (%s).",
                *(one.epoch + 1, one.path, one.before, one.after, one.reason),
            )
        self.changes += changes
        if changes:
            model = self.model
            change_in_training(model, functools.partial(convert, model, plan=plan))


def _in_float32(plan):
    return sum(
        row.policy == "float32" and row.layer_class != "InputLayer" for row in plan
    )


def _check(patience, calm_epochs, headroom, share, fallback):
    for name, value, least in (
        ("patience", patience, 1),
        ("calm_epochs", calm_epochs, 1),
        ("headroom", headroom, 1),
    ):
        if not value >= least:
            raise ValueError(
                f"`{name}` must be at least {least}. Received: {name}={value!r}. "
                "Leave it out for the default."
            )
    if not 0 <= share <= 1:
        raise ValueError(
            "`max_overflow_share` must be in [0, 1]. Received: "
            f"max_overflow_share={share!r}. Leave it out for the default."
        )
    if fallback not in ("float32", "mixed_bfloat16", "auto"):
        raise ValueError(
            "`fallback` must be 'float32', 'mixed_bfloat16' or 'auto'. Received: "
            f"fallback={fallback!r}. Pass 'auto' to choose by the hardware."
        )
