"""TensorFlow: the gradient of an `EinsumDense` kernel as one matrix product.

Keras hands most equations to `tf.matmul`, which repeats the kernel for each sample of
the batch. The gradient is then a product per sample: each is rounded to half precision
and written out, as large as the kernel, before they are added up. `tf.einsum` makes one
product of it, which adds up in float32 and rounds once where XLA or a GPU carries it
out. Of CPUs without XLA only some do, so that there all stays as it is.
"""

import contextlib
import functools
import re
import string
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_mixprec.intercept import restore_call
from keras_mixprec.structure import computes_in_half

# Inputs, kernel and outputs; of others nobody knows what their layers do with them.
_EQUATION = re.compile(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)")


@contextlib.contextmanager
def one_product(model: keras.Model, wanted: bool) -> Iterator[None]:
    """Inside, half-precision `EinsumDense` layers call `tf.einsum`.

    In a graph alone: op by op, its bookkeeping would take longer than it saves.

    Args:
        model: `keras.Model`, whose layers are called otherwise inside.
        wanted: Bool, whether XLA or a GPU carries out what is traced inside. Else, as
            outside a graph, nothing happens.
    """
    # Threads trace the replicas by turns: who comes second finds nothing left to do, so
    # that each layer is put back once. An eager step does not walk the layers.
    walked = model._flatten_layers() if wanted and not tf.executing_eagerly() else ()
    layers = [layer for layer in walked if _repeats_its_kernel(layer)]
    calls = [vars(layer).get("call") for layer in layers]
    try:
        for layer in layers:
            # Past Keras's bookkeeping of attributes, as with the equation below.
            vars(layer)["call"] = _with_another_spelling(layer, layer.call)
        yield
    finally:
        for layer, call in zip(layers, calls, strict=True):
            restore_call(layer, call)


def _repeats_its_kernel(layer):
    if not (isinstance(layer, keras.layers.EinsumDense) and computes_in_half(layer)):
        return False
    known = _EQUATION.fullmatch(str(vars(layer).get("equation")))
    is_ours = getattr(vars(layer).get("call"), "is_respelled", False)
    # A quantized one has another product.
    if not known or is_ours or not layer.built or layer.quantization_mode is not None:
        return False
    inputs, kernel, _ = known.groups()
    return "..." in inputs or len({*inputs} - {*kernel}) > 1


def _with_another_spelling(layer, call):
    @functools.wraps(call)
    def respelled(*args, **kwargs):
        equation, inputs = layer.equation, [*args, *kwargs.values()][0]
        # For the call alone: what asks for shapes reads the equation as well.
        vars(layer)["equation"] = _spelled_out(equation, len(inputs.shape))
        try:
            return call(*args, **kwargs)
        finally:
            vars(layer)["equation"] = equation

    respelled.is_respelled = True
    return respelled


def _spelled_out(equation, rank):
    """Return an equation as Keras, which knows some by heart, does not.

    With a blank; and with letters for an ellipsis, for which TensorFlow repeats the
    kernel as well.
    """
    inputs, kernel, outputs = _EQUATION.fullmatch(equation).groups()
    unused = [c for c in string.ascii_letters if c not in equation]
    letters = "".join(unused[: rank - len(inputs.replace("...", ""))])
    inputs, outputs = (part.replace("...", letters) for part in (inputs, outputs))
    return f"{inputs}, {kernel}->{outputs}"
