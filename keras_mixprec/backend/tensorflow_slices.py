"""TensorFlow: a sparse gradient that is made dense for XLA on a GPU is not written out.

Keras's optimizers ask for an embedding's gradient as a dense tensor, some twice, once
squared. TensorFlow writes each one out. Where XLA compiles a train step of ours for a
GPU, the tensor is what `looked_up` makes of it.

TensorFlow asks every conversion function that is registered, by priority, until one
does not decline. Ours does outside of such a step.
"""

from typing import Any

import tensorflow as tf

from keras_mixprec.backend import looked_up
from keras_mixprec.backend.tensorflow_xla import gpus
from keras_mixprec.backend.tensorflow_xla import is_compiling

# TensorFlow's own has 100.
_BEFORE_TENSORFLOW = 50


def _dense(
    slices: tf.IndexedSlices,
    dtype: tf.DType | None = None,
    name: str | None = None,
    as_ref: bool = False,
) -> Any:
    in_step = is_compiling() and not tf.executing_eagerly()
    if not in_step or not gpus() or as_ref or dtype not in (None, slices.dtype):
        return NotImplemented
    if slices.dense_shape is None or slices.values.shape.rank is None:
        return NotImplemented
    shape = tf.get_static_value(slices.dense_shape)
    if shape is None:
        return NotImplemented
    shape = tuple(map(int, shape))
    if not looked_up.pays(shape, slices.values.shape[0]):
        return NotImplemented
    found = _lookups(slices.indices, shape[0])
    return tf.cast(looked_up.gradient(found, slices.values)[0], slices.dtype)


def _lookups(ids, length):
    # Once for all that is made dense of a batch: XLA does not see that it is the same.
    known = tf.compat.v1.get_collection_ref("keras_mixprec/lookups")
    here = tf.compat.v1.get_default_graph()
    for same, rows, found in known:
        # The branches of a condition share their collections.
        if same is ids and rows == length and found.place_of.graph is here:
            return found
    known.append((ids, length, looked_up.lookups(ids, length)))
    return known[-1][2]


tf.register_tensor_conversion_function(tf.IndexedSlices, _dense, _BEFORE_TENSORFLOW)
