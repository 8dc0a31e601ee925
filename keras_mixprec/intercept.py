"""Watch the calls of layers and operations while a model runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def intercepted(
    operations: Iterable[keras.Operation], around: Callable, kept: dict | None = None
) -> Iterator:
    """Inside, route every call of the operations through a function.

    Args:
        operations: Layers or other `keras.Operation`.
        around: Called as `around(operation, call, args, kwargs)` in place of
            `call(*args, **kwargs)`.
        kept: Dict for this very `around`, in which routes are kept from one time to
            the next. Defaults to none: they are made anew.
    """
    before, kept = [], {} if kept is None else kept
    try:
        for operation in operations:
            call, known = operation.call, kept.get(operation)
            if known is None or known[0] != call:
                known = kept[operation] = call, _routed(operation, call, around)
            before.append((operation, vars(operation).get("call")))
            # Past Keras's bookkeeping of attributes: an eager step does this anew.
            vars(operation)["call"] = known[1]
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
