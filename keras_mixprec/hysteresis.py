"""When a layer leaves half precision and when it comes back: the rule, no model.

Leaving takes several troubled epochs in a row, coming back takes more calm ones, and
twice as many each time: a layer can change sides only so often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from keras_mixprec.ranges import LARGEST

# In the last third of a run the plan stands: nothing comes back there, nor so late that
# it would have to leave again there. To see that it must takes an epoch with overflows
# and, where the first batch does not show the layer, one in which it is looked for.
_SETTLED_FROM = 2 / 3
_PROBATION = 2


@dataclasses.dataclass(frozen=True)
class PrecisionChange:
    """A layer that changed its policy during training.

    Args:
        epoch: Int, from 0, the epoch after which it did.
        path: The layer, as in `mp.plan`.
        before: Name of the policy it had.
        after: Name of the policy it has from then on.
        reason: Why.
    """

    epoch: int
    path: str
    before: str
    after: str
    reason: str


@dataclasses.dataclass(frozen=True)
class HysteresisRule:
    """The numbers, as `AdaptivePrecision` takes them.

    Args:
        patience: Int, troubled epochs in a row before a layer leaves.
        calm_epochs: Int, calm epochs before it comes back.
        headroom: Float, what 65504 must be over the outputs of a calm layer.
    """

    patience: int
    calm_epochs: int
    headroom: float


class Hysteresis:
    """The state of one run.

    Args:
        rule: The numbers.
    """

    def __init__(self, rule: HysteresisRule):
        self.rule = rule
        self._troubled = 0
        # Of the layers that left: how long they are calm, and how long they must be.
        self._calm: dict[str, int] = {}
        self._needed: dict[str, int] = {}
        self._before: dict[str, str] = {}

    def after_epoch(
        self,
        epoch: int,
        epochs: float,
        policies: dict[str, str],
        blamed: str | None,
        largest: dict[str, float],
        fallback: Callable[[str], str],
    ) -> list[PrecisionChange]:
        """Return what an epoch changes: at most one layer.

        Args:
            epoch: Int, from 0, the epoch that ended.
            epochs: Number of epochs in the run, inf where unknown.
            policies: Layer path -> its policy.
            blamed: The layer to blame for trouble, `""` if it is not known, `None`
                if there was none.
            largest: Layer path -> its largest output, inf beyond float16.
            fallback: Function of a policy: the one to leave it for.
        """
        if blamed is None:
            self._troubled = 0
            return self._return(epoch, epochs, policies, self._calm_ones(largest))
        self._troubled += 1
        self._calm = dict.fromkeys(self._calm, 0)
        # One that came back is on probation.
        patience = 1 if blamed in self._needed else self.rule.patience
        if not blamed or self._troubled < patience:
            return []
        return [self._leave(epoch, blamed, policies[blamed], fallback)]

    def _leave(self, epoch, path, policy, fallback):
        reason = f"epochs with overflows in a row: {self._troubled}"
        self._troubled = 0
        self._calm[path] = 0
        self._before.setdefault(path, policy)
        self._needed[path] = 2 * self._needed.get(path, self.rule.calm_epochs / 2)
        return PrecisionChange(epoch, path, policy, fallback(policy), reason)

    def _calm_ones(self, largest):
        for path in self._calm:
            known = path in largest
            calm = known and largest[path] * self.rule.headroom <= LARGEST
            self._calm[path] = self._calm[path] + 1 if calm else 0
        return [p for p, epochs in self._calm.items() if epochs >= self._needed[p]]

    def _return(self, epoch, epochs, policies, calm):
        if not calm or epoch + 1 + _PROBATION > _SETTLED_FROM * epochs:
            return []
        path = calm[0]
        reason = f"calm epochs in a row: {self._calm.pop(path)}"
        after = self._before.pop(path)
        return [PrecisionChange(epoch, path, policies[path], after, reason)]
