"""TensorFlow: the gradient of an `EinsumDense` kernel as one matrix product.

Keras hands most equations to `tf.matmul`, which repeats the kernel for each sample of
the batch. The gradient is then a product per sample: each is rounded to half precision
and written out, as large as the kernel, before they are added up. `tf.einsum` makes one
product of it, which adds up in float32 and rounds once.
"""

import contextlib
import string
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_mixprec.structure import computes_in_half


@contextlib.contextmanager
def one_product(model: keras.Model) -> Iterator[None]:
    """Inside, half-precision `EinsumDense` layers call `tf.einsum`.

    In a graph alone: op by op, its bookkeeping would take longer than it saves.

    Args:
        model: `keras.Model`; the equations of such layers are spelled otherwise inside.
    """
    # Threads trace the replicas by turns: who comes second finds nothing left to do, so
    # that each equation is put back once.
    layers = [] if tf.executing_eagerly() else _that_repeat_their_kernel(model)
    equations = [layer.equation for layer in layers]
    try:
        for layer in layers:
            # Past Keras's bookkeeping of attributes.
            vars(layer)["equation"] = _spelled_out(layer)
        yield
    finally:
        for layer, equation in zip(layers, equations, strict=True):
            vars(layer)["equation"] = equation


def _that_repeat_their_kernel(model):
    kind = keras.layers.EinsumDense
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, kind)]
    return [layer for layer in layers if _is_known(layer) and _repeats(layer.equation)]


def _is_known(layer):
    # One that is not built reads its equation yet; a quantized one has another product.
    plain = layer.built and layer.quantization_mode is None
    return plain and computes_in_half(layer)


def _repeats(equation):
    inputs, kernel = equation.split("->")[0].split(",")
    # A blank is ours: see below.
    return " " not in kernel and ("..." in inputs or len({*inputs} - {*kernel}) > 1)


def _spelled_out(layer):
    """Return the equation of a layer as Keras, which knows some by heart, does not.

    With a blank; and with letters for an ellipsis, for which TensorFlow repeats the
    kernel as well.
    """
    inputs, rest = layer.equation.split(",")
    unused = [c for c in string.ascii_letters if c not in layer.equation]
    more = layer.input_spec.ndim - len(inputs.replace("...", ""))
    letters = "".join(unused[:more])
    inputs, rest = (part.replace("...", letters) for part in (inputs, rest))
    return f"{inputs}, {rest}"
