"""Which sublayers make the outputs of a layer that Python code runs."""

from __future__ import annotations

import dataclasses

import keras

from keras_mixprec.inputs import symbolic_inputs
from keras_mixprec.intercept import intercepted


@dataclasses.dataclass
class Trace:
    """One symbolic call of a layer, seen from inside.

    Args:
        calls: For every layer that ran, in order of completion: the layer, its flat
            inputs and its flat outputs.
    """

    calls: list[tuple[keras.Layer, list, list]]

    def inputs_of(self, layer: keras.Layer) -> list:
        """Return the flat tensors that a layer was called with."""
        return [x for made, inputs, _ in self.calls if made is layer for x in inputs]

    def outputs_of(self, layer: keras.Layer) -> list:
        """Return the flat tensors that a layer returned."""
        return [x for made, _, outputs in self.calls if made is layer for x in outputs]

    def maker(self, tensor, inside: set[int]) -> keras.Layer | None:
        """Return the outermost layer of a set that returned a tensor, None if none.

        Args:
            tensor: A tensor of the trace.
            inside: Ids of the layers to choose from.
        """
        makers = [
            layer
            for layer, _, outputs in self.calls
            if id(layer) in inside and any(x is tensor for x in outputs)
        ]
        return makers[-1] if makers else None


def trace(layer: keras.Layer, sample=None) -> Trace | None:
    """Call a layer on symbolic inputs and note what runs inside.

    Args:
        layer: A built layer.
        sample: Inputs whose shapes and types to use. Defaults to those that the
            layer was built or called with.

    Returns:
        The trace, or None where the layer cannot be called so.
    """
    calls: list = []

    def around(operation, call, args, kwargs):
        if operation is layer:
            calls.clear()  # Some backends run a call twice to learn its shapes.
        outputs = call(*args, **kwargs)
        calls.append((operation, _tensors((args, kwargs)), _tensors(outputs)))
        return outputs

    try:
        args, kwargs = symbolic_inputs(layer, sample)
        with intercepted(layer._flatten_layers(), around):
            keras.Operation.compute_output_spec(layer, *args, **kwargs)
    except Exception:  # Whatever a user's `call` raises, there is no trace of it.
        return None
    return Trace(calls)


def _tensors(structure) -> list:
    return [x for x in keras.tree.flatten(structure) if hasattr(x, "dtype")]
