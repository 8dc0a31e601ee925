"""Mixed precision for Keras 3: right on one device and on many, and visible."""

from keras_mixprec import compile_hook
from keras_mixprec.benchmark import benchmark
from keras_mixprec.benchmark_result import BenchmarkResult
from keras_mixprec.callbacks import LossScaleError
from keras_mixprec.callbacks import LossScaleGuard
from keras_mixprec.callbacks import MixedPrecisionMonitor
from keras_mixprec.callbacks import OverflowInspector
from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.plan import plan
from keras_mixprec.policy import policy_scope
from keras_mixprec.policy import set_policy
from keras_mixprec.precision_plan import LayerPlan
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.report import report

__version__ = "0.1.0"

__all__ = [
    "BenchmarkResult",
    "LayerPlan",
    "LossScaleError",
    "LossScaleGuard",
    "LossScaleOptimizer",
    "MixedPrecisionMonitor",
    "OverflowInspector",
    "PrecisionPlan",
    "benchmark",
    "convert",
    "plan",
    "policy_scope",
    "report",
    "set_policy",
    "to_float32",
]

compile_hook.put()
