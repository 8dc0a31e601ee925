"""Watch the calls of layers and operations while a model runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def intercepted(operations: Iterable[keras.Operation], around: Callable) -> Iterator:
    """Inside, route every call of the operations through a function.

    Args:
        operations: Layers or other `keras.Operation`.
        around: Called as `around(operation, call, args, kwargs)` in place of
            `call(*args, **kwargs)`.
    """
    before = []
    try:
        for operation in operations:
            before.append((operation, vars(operation).get("call")))
            # Past Keras's bookkeeping of attributes: an eager step does this anew.
            vars(operation)["call"] = _routed(operation, operation.call, around)
        yield
    finally:
        for operation, own in before:
            restore_call(operation, own)


def _routed(operation, call, around):
    @functools.wraps(call)
    def routed(*args, **kwargs):
        return around(operation, call, args, kwargs)

    return routed


def restore_call(operation: keras.Operation, own: Callable | None) -> None:
    """Undo an assignment to `operation.call`.

    Args:
        operation: The operation.
        own: What its instance dictionary held before, None if nothing.
    """
    if own is None:
        del vars(operation)["call"]
    else:
        vars(operation)["call"] = own
