"""The inspector inside `AdaptivePrecision`: one batch per epoch, or a hunt."""

from __future__ import annotations

from keras_mixprec.callbacks.inspector import OverflowInspector
from keras_mixprec.range_report import Frame


class Scout(OverflowInspector):
    """Looks at each epoch's first batch; while it hunts, at all until one overflows."""

    def __init__(self):
        super().__init__(batches=[0])
        self.hunting = False

    def take_frames(self) -> list[Frame]:
        """Return the frames since the last call: first batches and overflows."""
        report = self.report
        frames, report.frames = report.frames, []
        return frames

    def _wants(self, batch):
        return self.hunting or super()._wants(batch)

    def _reads_early(self):
        return self.hunting

    def _is_asked_for(self, batch):
        return True

    def _keep(self, found):
        for one in found:
            _, batch, step, instrument = one
            overflowed = self._overflowed(step, instrument)
            self.hunting = self.hunting and not overflowed
            if overflowed or batch == 0:
                self._kept.append(one)
