"""Callbacks: they observe a run, and read it once per epoch."""

from keras_mixprec.callbacks.guard import LossScaleError
from keras_mixprec.callbacks.guard import LossScaleGuard
from keras_mixprec.callbacks.inspector import OverflowInspector
from keras_mixprec.callbacks.monitor import MixedPrecisionMonitor

__all__ = [
    "LossScaleError",
    "LossScaleGuard",
    "MixedPrecisionMonitor",
    "OverflowInspector",
]
