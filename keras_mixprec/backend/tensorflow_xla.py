"""TensorFlow: whether XLA compiles what is being traced.

A graph does not know whether XLA will compile it; the model that traces does.
"""

import contextlib
import threading

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
