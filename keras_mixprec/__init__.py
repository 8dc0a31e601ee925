"""Mixed precision for Keras 3: right on one device and on many, and visible."""

from keras_mixprec.callbacks import MixedPrecisionMonitor
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.policy import policy_scope
from keras_mixprec.policy import set_policy

__version__ = "0.1.0"

__all__ = [
    "LossScaleOptimizer",
    "MixedPrecisionMonitor",
    "policy_scope",
    "set_policy",
]
