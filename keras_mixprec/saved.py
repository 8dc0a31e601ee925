"""Converted models keep their precisions through `save` and `load_model`.

Keras saves neither the policy of a Functional or Sequential model nor those of
sublayers that a layer makes itself. So a converted model's class becomes a subclass
of what it was, with the same name, whose config also holds the precisions, and whose
`from_config` builds the original class and puts them back. Loading such a file needs
`import keras_mixprec` first; `to_float32` before saving makes a file that does not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import keras

from keras_mixprec import compile_hook
from keras_mixprec.precisions import precisions_of
from keras_mixprec.precisions import preserved
from keras_mixprec.precisions import reset_precisions
from keras_mixprec.precisions import restore_precisions
from keras_mixprec.structure import walk

_KEY = "keras_mixprec"


@keras.saving.register_keras_serializable(package="keras_mixprec", name="Converted")
class Converted:
    """What a converted model's class gains: precisions in its config."""

    def get_config(self) -> dict:
        """Return the original config, with the precisions under a key of their own."""
        saved = {
            "layers": precisions_of(self),
            "wrapped": getattr(self, "_mixprec_wrapped", False),
        }
        with _as_it_was(self):
            original = keras.saving.serialize_keras_object(self)
        original.pop("compile_config", None)  # Keras adds it outside, for afterwards.
        config = original.pop("config")
        return {**config, _KEY: {"model": original, **saved}}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None):
        """Return a model of the original class, in the saved precisions."""
        config = dict(config)
        saved = config.pop(_KEY, None)
        if saved is None:
            return _original_class(cls).from_config(config)
        model = keras.saving.deserialize_keras_object(
            {**saved["model"], "config": config}, custom_objects=custom_objects
        )
        if restore_precisions(model, saved["layers"]):
            model._mixprec_wrapped = saved["wrapped"]
            remember_precisions(model)
        return model


@contextlib.contextmanager
def _as_it_was(model) -> Iterator[None]:
    """Inside, the model has the class and the policies it had before `convert`.

    Keras builds a layer anew in the policy of its config, but the sublayers it makes
    itself in float32: where the two do not fit, it could not be built.
    """
    converted = type(model)
    with preserved(model):
        reset_precisions(model)
        object.__setattr__(model, "__class__", _original_class(converted))
        try:
            yield
        finally:
            object.__setattr__(model, "__class__", converted)


@functools.cache
def _converted_class(original: type) -> type:
    names = {n: getattr(original, n) for n in ("__module__", "__qualname__", "__doc__")}
    converted = type(original.__name__, (Converted, original), names)
    # All under one name: each reads any config, since the original class is in it.
    register = keras.saving.register_keras_serializable
    return register(package="keras_mixprec", name="Converted")(converted)


def _original_class(converted: type) -> type:
    return converted.__bases__[1] if Converted in converted.__bases__ else converted


def remember_precisions(model: keras.Model) -> None:
    """From now on, save the precisions with the model, and with models inside it."""
    for place in walk(model):
        layer = place.layer
        if isinstance(layer, keras.Model) and not isinstance(layer, Converted):
            object.__setattr__(layer, "__class__", _converted_class(type(layer)))
    if compile_hook.computes_in_float16(model):
        compile_hook.install()


def forget_precisions(model: keras.Model) -> None:
    """Undo `remember_precisions`."""
    for place in walk(model):
        if isinstance(place.layer, Converted):
            original = _original_class(type(place.layer))
            object.__setattr__(place.layer, "__class__", original)
