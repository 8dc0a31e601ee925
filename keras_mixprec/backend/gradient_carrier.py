"""Statistics leave a compiled step where gradients do: at the optimizer.

Each layer's output goes through an identity that takes one argument more, a probe: a
small trainable variable. Its gradient is not a gradient but the statistics of the
output and of the output's gradient. That holds in any trace, rematerialized layers
and branches included, where a tensor could not be handed out by other means.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_mixprec.ranges import FIELDS
from keras_mixprec.ranges import PARTIAL
from keras_mixprec.ranges import ROWS
from keras_mixprec.ranges import measure_each
from keras_mixprec.ranges import total

# Of weights smaller than this, those of one shape are measured together.
_SMALL = 2**14
# Larger ones whose statistics are added up together: XLA's GPU compiler gives up on a
# kernel of very many operands, and makes one for each of them instead.
_JOINED = 8


class GradientCarrier:
    """Carries what layers output, and the gradients of that, to the optimizer.

    Args:
        paths: Strings, of the layers.
        calls: Int, how many calls or outputs of a layer to measure in a step.
        partial: Function of a tensor, `ranges.partial` as the backend runs it best.
            The gradient that it returns is what goes on to the layers before: XLA
            would else write many gradients out twice, in two layouts.
    """

    compiles = True

    def __init__(self, paths: list, calls: int, partial):
        self._calls, self._partial = calls, partial
        self.variables = self._make_probes(paths)
        self.start()

    def _make_probes(self, paths):
        return [make_probe(2 * self._calls, path) for path in paths]

    def start(self):
        """Begin a step."""
        # Calls of each layer, as far as they were measured.
        self._called = [0] * len(self.variables)

    def tap(self, layer: int, call: int, x):
        """Return `x` with the probe of a layer attached to it."""
        self._called[layer] = max(self._called[layer], call + 1)
        partial = self._partial
        before, after = 2 * call, 2 * (self._calls - call - 1)

        @ops.custom_gradient
        def identity(x, probe):
            forward, _ = partial(x)

            def gradient(*args, upstream=None):
                upstream = args[0] if upstream is None else upstream
                backward, upstream = partial(upstream)
                none = [ops.zeros((n * PARTIAL, ROWS)) for n in (before, after)]
                parts = [none[0], forward, backward, none[1]]
                return upstream, ops.concatenate(parts)

            return x, gradient

        return identity(x, ops.convert_to_tensor(self.variables[layer]))

    def rows(self, gradient_of, weights):
        """Return the statistics of a step: one row for each tensor.

        Args:
            gradient_of: Function of a variable: its gradient, or `None`.
            weights: List of gradients of weights, `None` where there is none.

        Returns:
            float32 tensor of shape `(2 * layers * calls + weights, len(FIELDS))`.
        """
        of_taps = self._of_taps(gradient_of)
        return ops.concatenate([of_taps, *self._of_weights(weights)])

    def _of_taps(self, gradient_of):
        # Most calls that a probe has room for are never made: XLA drops their part.
        taps, index = [], [0] * (2 * self._calls * len(self.variables))
        found = 0
        for layer, probe in enumerate(self.variables):
            gradient, used = gradient_of(probe), 2 * self._called[layer]
            if gradient is not None and used:
                taps.append(gradient[: used * PARTIAL])
                first = 2 * self._calls * layer
                index[first : first + used] = range(found + 1, found + used + 1)
                found += used
        rows = [ops.zeros((1, len(FIELDS))), *_totals(taps)]
        return ops.take(ops.concatenate(rows), np.array(index, "int32"), axis=0)

    def _of_weights(self, grads):
        # TensorFlow's sparse gradients: the values alone.
        grads = [g.values if hasattr(g, "dense_shape") else g for g in grads]
        large, groups, rows, order = [], {}, [], []
        for i, g in enumerate(grads):
            size = 0 if g is None else math.prod(n or _SMALL for n in g.shape)
            if size >= _SMALL:
                large.append(i)
            else:
                kind = None if g is None else (tuple(g.shape), g.dtype)
                groups.setdefault(kind, []).append(i)
        for i in range(0, len(large), _JOINED):
            joined = [self._partial(grads[i])[0] for i in large[i : i + _JOINED]]
            rows += _totals(joined)
        order += large
        for kind, members in groups.items():
            order += members
            if kind is None:
                rows.append(ops.zeros((len(members), len(FIELDS))))
            else:
                rows.append(measure_each(ops.stack([grads[i] for i in members])))
        if not rows:
            return []
        places = [order.index(i) for i in range(len(order))]
        return [ops.take(ops.concatenate(rows), places, axis=0)]


def _totals(partials):
    return [total(ops.concatenate(partials))] if partials else []


def make_probe(tensors, path):
    """Return a variable whose gradient is what was measured of so many tensors."""
    # Names must differ: Keras keeps some variables by name.
    name = f"keras_mixprec_probe_{path.replace('/', '_')}"
    # Not autocast: in a float16 layer counts would end at 65504, and be rounded.
    return keras.Variable(
        initializer="zeros",
        shape=(tensors * PARTIAL, ROWS),
        dtype="float32",
        autocast=False,
        name=name,
    )
