"""Make compiled models run with the precisions their layers have now."""

from __future__ import annotations

import keras

from keras_mixprec import compile_hook
from keras_mixprec.structure import walk


def recompile(model: keras.Model) -> None:
    """Drop what was compiled for other precisions, in the model and those inside it.

    Optimizers keep their state, metrics and losses are the same objects. An optimizer
    is wrapped where the model computes in float16 now, and unwrapped where it no
    longer does and the wrapping was ours.
    """
    for place in walk(model):
        if isinstance(place.layer, keras.Model):
            _recompile_one(place.layer)


def _recompile_one(model):
    model.train_function = model.test_function = model.predict_function = None
    if not model.compiled:
        return
    optimizer = _fitting_optimizer(model)
    if type(model).compile is keras.Model.compile:
        config = getattr(model, "_compile_config", None)
        model.compile(**{**config.config, "optimizer": optimizer})
    else:  # A `compile` of the user's own: its arguments are not known.
        model.optimizer = optimizer


def _fitting_optimizer(model):
    optimizer = getattr(model, "optimizer", None)
    if compile_hook.computes_in_float16(model):
        scaling = compile_hook.scaling_optimizer(model, optimizer)
        if scaling is not optimizer:
            model._mixprec_wrapped = True
        return scaling
    if getattr(model, "_mixprec_wrapped", False):
        model._mixprec_wrapped = False
        return getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer
