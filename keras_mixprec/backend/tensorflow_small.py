"""TensorFlow outside XLA: small tensors together.

An operation takes a microsecond to begin, in which a CPU squares a thousand numbers;
and half of a model's variables are biases and the like.
"""

import collections
from collections.abc import Callable

import numpy as np
import tensorflow as tf

_LARGEST = 1024


def mapped(function: Callable, tensors: list) -> list:
    """Return what an elementwise function makes of each tensor.

    Args:
        function: Callable of a tensor.
        tensors: List of tensors or `IndexedSlices`.
    """
    found, small = list(tensors), _groups(tensors)
    for places in small:
        flat = function(_flat([tensors[i] for i in places]))
        pieces = tf.split(flat, [tensors[i].shape.num_elements() for i in places])
        for i, piece in zip(places, pieces, strict=True):
            shape = tensors[i].shape
            found[i] = piece if shape.rank == 1 else tf.reshape(piece, shape)
    for i in _others(tensors, small):
        found[i] = function(tensors[i])
    return found


def summed(elementwise: Callable, whole: Callable, tensors: list) -> tf.Tensor:
    """Return a number for each tensor, as a vector.

    Args:
        elementwise: Callable of a tensor, whose values are summed up for small ones.
        whole: Callable of a tensor, returns the number of another one.
        tensors: List of tensors or `None`, the latter given to `whole` as well.
    """
    small = _groups(tensors)
    others = _others(tensors, small)
    sums = [tf.stack([whole(tensors[i]) for i in others])] if others else []
    for places in small:
        sizes = [tensors[i].shape.num_elements() for i in places]
        flat = elementwise(_flat([tensors[i] for i in places]))
        sums.append(tf.math.segment_sum(flat, np.repeat(range(len(sizes)), sizes)))
    order = [*others, *(i for places in small for i in places)]
    return tf.gather(tf.concat(sums, 0), np.argsort(order)) if small else sums[0]


def _groups(tensors):
    """Return the positions of small tensors that are several of one dtype."""
    found = collections.defaultdict(list)
    for i, x in enumerate(tensors):
        if _is_small(x):
            found[x.dtype].append(i)
    return [places for places in found.values() if len(places) > 1]


def _is_small(x):
    if not tf.is_tensor(x) or isinstance(x, tf.IndexedSlices):
        return False
    # An unknown size is `None`, and what holds nothing has no sum.
    return 1 <= (x.shape.num_elements() or 0) <= _LARGEST


def _others(tensors, groups):
    grouped = {i for places in groups for i in places}
    return [i for i in range(len(tensors)) if i not in grouped]


def _flat(tensors):
    ranks = (x if x.shape.rank == 1 else tf.reshape(x, (-1,)) for x in tensors)
    return tf.concat(list(ranks), 0)
