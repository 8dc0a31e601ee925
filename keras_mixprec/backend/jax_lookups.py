"""JAX: gradients of looked-up rows are added up in float32.

`Embedding` asks for its table as it is and casts the rows. But a train step calls the
model's `call`, not the model, and where no autocast scope is open Keras casts such a
table all the same: gradients are added up in half precision, where 2048 and 1 are 2048.

On one GPU layers with large tables look up by a function of ours, whose gradient is
left to what reads it (`looked_up`).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import ops
from keras.src.backend.common.variables import AutocastScope

from keras_mixprec.backend import looked_up
from keras_mixprec.intercept import intercepted


class _Trace(threading.local):
    """What is traced: (gradient, its sums) of each lookup, `None` outside."""

    sums = None


_trace = _Trace()


@contextlib.contextmanager
def own_lookups(model: keras.Model, wanted: bool) -> Iterator[None]:
    """Inside, `Embedding` layers look up in their tables as they are.

    By our function not in a model with a train step or loss of its own: it may ask for
    what JAX cannot derive from a gradient that is ours.

    Args:
        model: `keras.Model`, whose `call` is traced inside.
        wanted: Bool, whether XLA would compile what is traced inside for one GPU, so
            that large tables are looked up in by our function.
    """
    kind = type(model)
    own = kind.train_step is keras.Model.train_step
    own = own and kind.compute_loss is keras.Model.compute_loss
    around = _looked_up_by_us if wanted and own else _looked_up_as_it_is
    before, _trace.sums = _trace.sums, []
    try:
        with intercepted(filter(_is_plain, model._flatten_layers()), around):
            yield
    finally:
        _trace.sums = before


def sums_of(gradient: Any) -> Any:
    """Return an array whose sum of squares is that of a gradient.

    Args:
        gradient: Array. One that is the gradient of our function, and of nothing else,
            is not written out to be looked at; another is returned as it is.
    """
    return next((s for g, s in _trace.sums or () if g is gradient), gradient)


def _is_plain(layer):
    if type(layer).call is not keras.layers.Embedding.call or "call" in vars(layer):
        return False
    return layer.built and layer.quantization_mode is None and not layer.lora_enabled


def _looked_up_as_it_is(layer, call, args, kwargs):
    with AutocastScope(None):
        return call(*args, **kwargs)


def _looked_up_by_us(layer, call, args, kwargs):
    (ids,) = (*args, *kwargs.values())
    with AutocastScope(None):
        table = ops.convert_to_tensor(layer.embeddings)
    # Else it is sparse, or the step is not compiled.
    is_traced = isinstance(ids, jax.core.Tracer)
    # Each element of a `vmap` would have a gradient as large as the table.
    is_whole = is_traced and type(ids).__name__ != "BatchTracer"
    if not (is_whole and looked_up.pays(table.shape, ids.size)):
        return _looked_up_as_it_is(layer, call, args, kwargs)
    if ids.dtype not in ("int32", "int64"):
        ids = ids.astype("int32")
    return ops.cast(_rows(table, ids), layer.compute_dtype)


def _rows(table, ids):
    (length, *width), kind = table.shape, table.dtype

    @jax.custom_vjp
    def rows(table, ids):
        return jnp.take(table, ids, axis=0)

    def forward(table, ids):
        return rows(table, ids), ids

    def backward(ids, upstream):
        # As `take` counts from the end, too.
        ids = jnp.where(ids < 0, ids + length, ids).reshape(-1)
        upstream = upstream.reshape(ids.size, *width)
        lookups = looked_up.lookups(ids, length)
        gradient, sums = looked_up.gradient(lookups, upstream)
        gradient = gradient.astype(kind)
        if _trace.sums is not None:
            # Else another derives what was traced in a step.
            _trace.sums.append((gradient, sums.astype(kind)))
        return gradient, None

    rows.defvjp(forward, backward)
    return rows(table, ids)
