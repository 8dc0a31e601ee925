"""Mixed precision for Keras 3: right on one device and on many, and visible."""

import importlib
import typing

from keras_mixprec import compile_hook
from keras_mixprec.callbacks.guard import LossScaleError
from keras_mixprec.callbacks.guard import LossScaleGuard
from keras_mixprec.callbacks.monitor import MixedPrecisionMonitor
from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.optimizer import LossScaleOptimizer
from keras_mixprec.plan import plan
from keras_mixprec.policy import policy_scope
from keras_mixprec.policy import set_policy
from keras_mixprec.precision_plan import LayerPlan
from keras_mixprec.precision_plan import PrecisionPlan

if typing.TYPE_CHECKING:
    from keras_mixprec.benchmark_result import BenchmarkResult
    from keras_mixprec.benchmarking import benchmark
    from keras_mixprec.calibration import calibrate
    from keras_mixprec.callbacks.adaptive import AdaptivePrecision
    from keras_mixprec.callbacks.inspector import OverflowInspector
    from keras_mixprec.callbacks.validator import PrecisionValidator
    from keras_mixprec.compare import compare_precision
    from keras_mixprec.precision_report import PrecisionReport
    from keras_mixprec.reporting.page import report

__version__ = "0.1.0"

__all__ = [
    "AdaptivePrecision",
    "BenchmarkResult",
    "LayerPlan",
    "LossScaleError",
    "LossScaleGuard",
    "LossScaleOptimizer",
    "MixedPrecisionMonitor",
    "OverflowInspector",
    "PrecisionPlan",
    "PrecisionReport",
    "PrecisionValidator",
    "benchmark",
    "calibrate",
    "compare_precision",
    "convert",
    "plan",
    "policy_scope",
    "report",
    "set_policy",
    "to_float32",
]

# Loaded on first use, to keep the import fast. No module here bears the name of what
# it holds: importing a module puts it into the package under its own name.
_ON_FIRST_USE = {
    "AdaptivePrecision": "callbacks.adaptive",
    "BenchmarkResult": "benchmark_result",
    "OverflowInspector": "callbacks.inspector",
    "PrecisionReport": "precision_report",
    "PrecisionValidator": "callbacks.validator",
    "benchmark": "benchmarking",
    "calibrate": "calibration",
    "compare_precision": "compare",
    "report": "reporting.page",
}


def __getattr__(name):
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_ON_FIRST_USE[name]}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})


compile_hook.put()
