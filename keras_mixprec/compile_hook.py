"""The one hook, around the public `keras.Model.compile`.

Its reach: while installed, every `compile` of every Keras model
- gives a bare optimizer our loss scaling if any layer of the model computes in
  float16 (unless `auto_scale_loss=False`; an optimizer that scales already is kept);
- makes the model's train step a transaction (`transaction.attach`).

`install` runs when a float16 policy is set, a model is converted, or a
`LossScaleOptimizer` is built; `uninstall` leaves `keras.Model` as Keras made it.
Models that were compiled in between keep what they were given.
"""

import functools

import keras

_installed = []


def install() -> None:
    """Wrap `keras.Model.compile`. Idempotent."""
    if _installed:
        return
    original = keras.Model.compile

    @functools.wraps(original)
    def compile(self, optimizer="rmsprop", *args, **kwargs):
        # Late, because building an optimizer installs this hook.
        from keras_mixprec import transaction

        if kwargs.get("auto_scale_loss", True):
            optimizer = scaling_optimizer(self, optimizer)
        original(self, optimizer, *args, **kwargs)
        transaction.attach(self)

    _installed.append(vars(keras.Model).get("compile"))
    keras.Model.compile = compile


def uninstall() -> None:
    """Put `keras.Model.compile` back. Idempotent."""
    if not _installed:
        return
    own = _installed.pop()
    if own is None:
        del keras.Model.compile
    else:
        keras.Model.compile = own


def is_installed() -> bool:
    """Whether `keras.Model.compile` is wrapped."""
    return bool(_installed)


def computes_in_float16(model: keras.Model) -> bool:
    """Whether the model or any layer inside it computes in float16."""
    return any(
        layer.compute_dtype == "float16"
        for layer in model._flatten_layers()
        if not isinstance(layer, keras.layers.InputLayer)
    )


def scaling_optimizer(model: keras.Model, optimizer):
    """Return `optimizer`, wrapped in ours if `model` needs it and it is bare."""
    from keras_mixprec.optimizer import LossScaleOptimizer

    if optimizer is None or not computes_in_float16(model):
        return optimizer
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
