"""Make compiled models run with the precisions their layers have now."""

from __future__ import annotations

from collections.abc import Callable

import keras

from keras_mixprec import compile_hook
from keras_mixprec import transaction
from keras_mixprec.structure import any_in_half
from keras_mixprec.structure import walk


def recompile(model: keras.Model, initial_scale: float | None = None) -> None:
    """Drop what was compiled for other precisions, in the model and those inside it.

    Optimizers keep their state, metrics and losses are the same objects. An optimizer
    is wrapped where the model computes in float16 now, and unwrapped where it no
    longer does and the wrapping was ours.

    Args:
        model: The model.
        initial_scale: Float, where an optimizer that is wrapped here begins. Defaults
            to the optimizer's default.
    """
    for place in walk(model):
        if isinstance(place.layer, keras.Model):
            _recompile_one(place.layer, initial_scale)


def change_in_training(model: keras.Model, change: Callable[[], None]) -> None:
    """Change a model's precisions between two epochs of `fit`.

    `fit` goes on with the same optimizer, whatever the model computes in now: scaling
    by powers of two does no harm to a float32 model.

    Args:
        model: The model that trains.
        change: Converts it.
    """
    was_wrapped = getattr(model, "_mixprec_wrapped", False)
    trains = model.train_function is not None
    model._mixprec_wrapped = False
    try:
        change()
    finally:
        model._mixprec_wrapped = was_wrapped
    if trains:
        model.make_train_function()


def _recompile_one(model, initial_scale):
    model.train_function = model.test_function = model.predict_function = None
    if not model.compiled:
        return
    optimizer = _fitting_optimizer(model, initial_scale)
    if optimizer is getattr(model, "optimizer", None) and not _lacks_transaction(model):
        # Compiling again would only drop what the metrics counted.
        _renew_train_step(model)
        return
    if type(model).compile is keras.Model.compile:
        config = getattr(model, "_compile_config", None)
        model.compile(**{**config.config, "optimizer": optimizer})
    else:  # A `compile` of the user's own: its arguments are not known.
        model.optimizer = optimizer
        if _lacks_transaction(model):
            transaction.attach(model)


def _renew_train_step(model):
    # JAX looks up what it traced by the function: the same one would run as before.
    if _is_attached(model):
        transaction.attach(model, model.fit.warn_unscaled)


def _is_attached(model):
    return getattr(model.train_step, "is_transaction", False)


def _lacks_transaction(model):
    return any_in_half(model) and not _is_attached(model)


def _fitting_optimizer(model, initial_scale):
    optimizer = getattr(model, "optimizer", None)
    if compile_hook.computes_in_float16(model):
        scaling = compile_hook.scaling_optimizer(model, optimizer, initial_scale)
        if scaling is not optimizer:
            model._mixprec_wrapped = True
        return scaling
    if getattr(model, "_mixprec_wrapped", False):
        model._mixprec_wrapped = False
        return getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer
