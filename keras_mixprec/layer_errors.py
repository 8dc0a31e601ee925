"""What a layer loses itself in its precision, and what it was given lost already."""

from __future__ import annotations

import math

import keras

from keras_mixprec.difference import Difference
from keras_mixprec.difference import difference
from keras_mixprec.recording import Call
from keras_mixprec.recording import fixed_inside
from keras_mixprec.recording import replay

Pairs = list[tuple[Call, Call]]


def total_errors(pairs: Pairs) -> dict[int, Difference]:
    """Return layer id -> how far its outputs are from the reference's.

    Args:
        pairs: Calls in the reference and in another precision.
    """
    return _by_layer(
        (ref.layer, difference(ref.outputs, x.outputs)) for ref, x in pairs
    )


def own_errors(pairs: Pairs) -> dict[int, Difference]:
    """Return layer id -> the error of the layer fed with the reference's inputs.

    The model has the other precision. Layers inside a layer return what they returned
    in the reference. A layer that cannot be called alone is left out.

    Args:
        pairs: Calls in the reference and in the other precision.
    """

    def own(ref, other):
        with fixed_inside(ref, other) as given:
            found = [difference(ref.outputs, replay(ref))]
        # What a layer hands to those inside is its own work as well.
        found += [difference(exact, now) for exact, now in given]
        return max(found, key=lambda d: (not math.isnan(d.relative), d.relative))

    return _by_layer(_each(own, pairs))


def inherited_errors(pairs: Pairs) -> dict[int, Difference]:
    """Return layer id -> the error of the reference layer fed with the other's inputs.

    The model has the reference's precision.

    Args:
        pairs: Calls in the reference and in the other precision.
    """
    return _by_layer(_each(lambda ref, x: difference(ref.outputs, replay(x)), pairs))


def _each(measure, pairs):
    for ref, other in pairs:
        try:
            yield ref.layer, measure(ref, other)
        except Exception:  # A user's `call` may need what only its model gives it.
            continue


def _by_layer(found) -> dict[int, Difference]:
    errors: dict[int, Difference] = {}
    layer: keras.Layer
    for layer, error in found:
        errors[id(layer)] = errors.get(id(layer), Difference()) + error
    return errors
