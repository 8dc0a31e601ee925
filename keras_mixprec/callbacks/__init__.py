"""Callbacks: they observe a run, and read it once per epoch."""

from keras_mixprec.callbacks.monitor import MixedPrecisionMonitor

__all__ = ["MixedPrecisionMonitor"]
