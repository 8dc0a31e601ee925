"""`PrecisionValidator`: half against float32 on held-out data, while training."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import numbers
import warnings
from typing import Any

import keras
from keras.utils import unpack_x_y_sample_weight

from keras_mixprec.calibration import TOLERANCE
from keras_mixprec.callbacks.order import stand_first
from keras_mixprec.compare import agreement
from keras_mixprec.convert import convert
from keras_mixprec.difference import difference
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precisions import preserved
from keras_mixprec.present import present_plan
from keras_mixprec.present import present_policy
from keras_mixprec.present import set_all
from keras_mixprec.recompile import change_in_training
from keras_mixprec.search import Search
from keras_mixprec.trials import Trials
from keras_mixprec.untouched import unchanged_variables

_logger = logging.getLogger("keras_mixprec")
_ACTIONS = ("warn", "stop", "promote")


@dataclasses.dataclass(frozen=True)
class Promotion:
    """A layer that went to float32 during training.

    Args:
        epoch: Int, from 0, the epoch after which it did.
        path: The layer, as in `mp.plan`.
        reason: Why.
    """

    epoch: int
    path: str
    reason: str


class PrecisionValidator(keras.callbacks.Callback):
    """Compare half precision with float32, same weights, on held-out data.

    Every `every` epochs the model is run on the data as it is and in float32, in
    inference mode. All other callbacks see the keys in the epoch's logs:

    | key | what |
    |-|-|
    | `precision_error` | relative error of the outputs: L2 norm of the difference \
over that in float32; inf if an output is not finite that is so in float32; NaN if \
none is |
    | `precision_agreement` | share of examples with the same class; absent where the \
outputs are no classes |
    | `val_loss_float32` | the loss on the data in float32; absent without targets. \
Give the data of `validation_data`, and it stands beside `val_loss` |

    Where `precision_error` is above the tolerance, `"promote"` moves the layer with
    the largest own error to float32, measures again, and so on; then training goes on
    with the same optimizer state; the logs say how it stands after the promotions.

    Example:

    ```python
    validator = mp.PrecisionValidator((x_val, y_val), on_violation="promote")
    model.fit(x, y, validation_data=(x_val, y_val), callbacks=[validator])
    validator.promotions
    ```

    Args:
        data: `(inputs, targets)`, `(inputs, targets, sample_weights)`, or inputs alone
            (an array, or a list or dict of them): one batch, held out.
        every: Int >= 1, epochs from one comparison to the next. Defaults to `1`.
        tolerance: Float > 0, the `precision_error` allowed. Defaults to `0.01`, in
            bfloat16 `0.08`.
        on_violation: `"warn"`, once until the tolerance holds again; `"stop"`, which
            ends training after the epoch; or `"promote"`. Defaults to `"warn"`.
        max_promotions: Int, the most layers to promote in one run. Defaults to `8`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        data: Any,
        every: int = 1,
        tolerance: float | None = None,
        on_violation: str = "warn",
        max_promotions: int = 8,
    ):
        super().__init__()
        _check(every, tolerance, on_violation, max_promotions)
        parts = data if isinstance(data, tuple) else (data,)
        self._x, self._y, self._sample_weight = unpack_x_y_sample_weight(parts)
        self.every, self.tolerance = every, tolerance
        self.on_violation, self.max_promotions = on_violation, max_promotions
        self.promotions: list[Promotion] = []
        self._warned = False

    def set_model(self, model: keras.Model) -> None:
        """Take the model, and the first place in the list of callbacks."""
        super().set_model(model)
        stand_first(self)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forget the promotions of earlier runs."""
        self.promotions, self._warned = [], False

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Compare, log, and act where the tolerance is exceeded."""
        if (epoch + 1) % self.every:
            return
        found = self._measured()
        if found["precision_error"] > self._allowed():
            found = self._act(epoch, found)
        else:
            self._warned = False
        if logs is not None:
            logs |= found

    def _measured(self) -> dict[str, float]:
        model, x = self.model, self._x
        with preserved(model), unchanged_variables(model):
            outputs = model(x, training=False)
            set_all(model, "float32")
            exact = model(x, training=False)
            logs = {"precision_error": difference(exact, outputs).relative}
            agreed = agreement(exact, outputs)
            if agreed is not None:
                logs["precision_agreement"] = agreed
            if self._y is not None and model.compiled:
                loss = model.compute_loss(
                    x, self._y, exact, self._sample_weight, training=False
                )
                logs["val_loss_float32"] = float(keras.ops.convert_to_numpy(loss))
        return logs

    def _allowed(self):
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCE.get(present_policy(self.model), 0.0)

    # -- violations -----------------------------------------------------------------

    def _act(self, epoch, found):
        if self.on_violation == "promote":
            found = found | self._promote(epoch)
        error, allowed = found["precision_error"], self._allowed()
        if not error > allowed:
            return found
        self._report(
            f"Epoch {epoch + 1}: the outputs of model '{self.model.name}' are off by "
            f"{error:.1e} in half precision (allowed: {allowed:g}). "
            "`mp.compare_precision(model, x)` shows which layer makes the error; keep "
            "it in float32 with `mp.convert(model, keep_float32=[...])`, or let "
            '`on_violation="promote"` do so.'
        )
        if self.on_violation == "stop":
            self.model.stop_training = True
        return found

    def _report(self, message):
        if not self._warned:
            warnings.warn(message, stacklevel=2)
        self._warned = True

    def _promote(self, epoch):
        model, allowed = self.model, self._allowed()
        plan = present_plan(model)
        before = len(self.promotions)
        with preserved(model), unchanged_variables(model):
            trials = Trials(model, [(self._x, self._y)])
            half = {row.path: row.policy for row in plan if row.policy in HALF}
            search = Search(trials, plan, half, allowed, lambda row: 1.0, math.inf)
            while search.error([0]) > allowed:
                worst = self._next(search)
                if worst is None:
                    break
                self.promotions.append(Promotion(epoch, *worst))
        new = self.promotions[before:]
        if not new:
            return {}
        change_in_training(model, functools.partial(convert, model, plan=plan))
        for one in new:
            _logger.warning(
                "Epoch %d: layer '%s' is in float32 from now on (%s).",
                *(epoch + 1, one.path, one.reason),
            )
        return self._measured()

    def _next(self, search):
        if len(self.promotions) >= self.max_promotions:
            return None
        return search.promote_worst([0])


def _check(every, tolerance, on_violation, max_promotions):
    if not (isinstance(every, numbers.Integral) and every >= 1):
        raise ValueError(
            f"`every` must be an integer >= 1. Received: every={every!r}. "
            "Pass 1 to compare after every epoch."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            f"`tolerance` must be above 0. Received: tolerance={tolerance!r}. "
            "Leave it out for the default."
        )
    if on_violation not in _ACTIONS:
        raise ValueError(
            f"`on_violation` must be one of {', '.join(map(repr, _ACTIONS))}. "
            f"Received: on_violation={on_violation!r}. Pass 'promote' to have the "
            "layer to blame moved to float32."
        )
    if not (isinstance(max_promotions, numbers.Integral) and max_promotions >= 0):
        raise ValueError(
            "`max_promotions` must be an integer >= 0. Received: "
            f"max_promotions={max_promotions!r}. Leave it out for the default."
        )
