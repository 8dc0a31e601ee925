"""TensorFlow: whether XLA compiles what is being traced, and what only it knows.

A graph does not know whether XLA will compile it; the model that traces does.
"""

import contextlib
import threading
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as xla_ops

_trace = threading.local()


@contextlib.contextmanager
def compiling(by_xla: bool):
    """Say to what is traced inside whether XLA will compile it.

    Args:
        by_xla: Whether it will.
    """
    before = is_compiling()
    _trace.xla = by_xla
    try:
        yield
    finally:
        _trace.xla = before


def is_compiling() -> bool:
    """Return whether XLA will compile what is being traced."""
    return getattr(_trace, "xla", False)


def gpus() -> list:
    """Return the GPUs that TensorFlow sees."""
    return tf.config.list_physical_devices("GPU")


def barrier(x: Any) -> Any:
    """Return a tensor as it is, across which XLA fuses nothing. It has no gradient."""
    return xla_ops.optimization_barrier(x)[0]
