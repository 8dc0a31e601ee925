"""One probe for all layers: TensorFlow's gradients may be rows of a table.

A compiled step is handed every variable that it may read, one by one, while the GPU
waits. Two hundred probes more are a tenth of what BERT-base's step takes to start.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_mixprec.backend.gradient_carrier import GradientCarrier
from keras_mixprec.backend.gradient_carrier import make_probe
from keras_mixprec.ranges import FIELDS
from keras_mixprec.ranges import PARTIAL
from keras_mixprec.ranges import ROWS
from keras_mixprec.ranges import total


class SparseCarrier(GradientCarrier):
    """The same, in the rows of one probe: one for each call of a layer.

    Args:
        paths: Strings, of the layers.
        calls: Int, how many calls or outputs of a layer to measure in a step.
        partial: As `GradientCarrier` takes it.
    """

    def _make_probes(self, paths):
        # Its gradient has the rows that were measured, no others.
        self._tensors = 2 * self._calls * len(paths)
        return [make_probe(self._tensors, "all")]

    def start(self):
        """Begin a step: what was measured is in the gradient itself."""

    def tap(self, layer: int, call: int, x):
        """Return `x` with a row of the probe attached to it."""
        partial = self._partial
        first = 2 * (layer * self._calls + call) * PARTIAL
        rows = np.arange(first, first + 2 * PARTIAL, dtype="int32")

        @tf.custom_gradient
        def identity(x, probe):
            forward, _ = partial(x)

            def gradient(upstream):
                backward, upstream = partial(upstream)
                found = tf.concat([forward, backward], 0)
                shape = tf.constant([self._tensors * PARTIAL, ROWS])
                return upstream, tf.IndexedSlices(found, tf.constant(rows), shape)

            return x, gradient

        return identity(x, keras.ops.convert_to_tensor(self.variables[0]))

    def _of_taps(self, gradient_of):
        gradient = gradient_of(self.variables[0])
        if gradient is None:
            return tf.zeros((self._tensors, len(FIELDS)))
        if isinstance(gradient, tf.IndexedSlices) and gradient.values.shape[0] is None:
            # Out of a condition, how many rows there are depends on the branch taken,
            # and XLA has to know.
            gradient = tf.convert_to_tensor(gradient)
        if not isinstance(gradient, tf.IndexedSlices):
            return total(gradient)
        # In the order of the backward pass. Of a tensor that is there twice, as one in
        # both branches of a condition is, the rows of all but one are 0.
        tensors = gradient.indices[::PARTIAL] // PARTIAL
        found = total(gradient.values)
        return tf.math.unsorted_segment_sum(found, tensors, self._tensors)
