"""The one hook, around the public `keras.Model.compile`, in place from import on.

Its reach, at every `compile` of a Keras model:
- a model that is given our optimizer, or that computes in half precision anywhere, has
  its train step made a transaction (`transaction.attach`);
- while scaling is on, a bare optimizer of a model that computes in float16 anywhere
  gets our loss scaling (unless `auto_scale_loss=False`; one that scales is kept).

It stands on the class that defines `compile`: to Keras, a model whose class has
another `compile` than its trainer is one that overrides it, and not compiled on load.

Every other model is compiled as Keras does it. `install` turns scaling on: a float16
policy does so, and `convert`. `uninstall` turns it off: `set_policy("float32")` does.
`remove` leaves `keras.Model` as Keras made it.

From import on, because `model.compile(LossScaleOptimizer(...))` looks `compile` up
before its argument is built.
"""

import functools

import keras

from keras_mixprec.structure import any_in_half

# What the hook knows: whether scaling is on, and the method it stands before.
_state = {"scaling": False, "original": None}


def install() -> None:
    """Turn scaling on in `compile`. Idempotent."""
    put()
    _state["scaling"] = True


def uninstall() -> None:
    """Turn scaling off again. Idempotent."""
    _state["scaling"] = False


def is_installed() -> bool:
    """Whether `compile` gives float16 models our loss scaling."""
    return _state["scaling"]


def put() -> None:
    """Stand before `keras.Model.compile`. Idempotent."""
    if _state["original"] is None:
        _state["original"] = keras.Model.compile
        _owner().compile = _hooked(keras.Model.compile)


def remove() -> None:
    """Leave `keras.Model` as Keras made it, scaling off. Idempotent."""
    uninstall()
    if _state["original"] is not None:
        _owner().compile = _state["original"]
        _state["original"] = None


def _owner():
    return next(c for c in keras.Model.__mro__ if "compile" in vars(c))


def _hooked(original):
    @functools.wraps(original)
    def compile(self, optimizer="rmsprop", *args, **kwargs):
        # Late, because these modules need the hook's.
        from keras_mixprec import transaction
        from keras_mixprec.optimizer import LossScaleOptimizer

        auto_scale_loss = kwargs.get("auto_scale_loss", True)
        if auto_scale_loss and _state["scaling"]:
            optimizer = scaling_optimizer(self, optimizer)
        original(self, optimizer, *args, **kwargs)
        ours = isinstance(self.optimizer, LossScaleOptimizer)
        if ours or _state["scaling"] or any_in_half(self):
            warn = auto_scale_loss and _state["scaling"]
            transaction.attach(self, warn_unscaled=warn)

    return compile


def computes_in_float16(model: keras.Model) -> bool:
    """Whether the model or any layer inside it computes in float16."""
    return any(
        layer.compute_dtype == "float16"
        for layer in model._flatten_layers()
        if not isinstance(layer, keras.layers.InputLayer)
    )


def unscaled_message(model: keras.Model) -> str | None:
    """Return what to do if `model` computes in float16 and nothing scales its loss."""
    if not computes_in_float16(model):
        return None
    problem = (
        f"Model '{model.name}' computes in float16 but its loss is not scaled: small "
        "gradients become 0. Mend it with "
    )
    optimizers = {
        name: isinstance(value, keras.optimizers.LossScaleOptimizer)
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer)
    }
    bare = [n for n, scales in optimizers.items() if n != "optimizer" and not scales]
    if bare and type(model).train_step is not keras.Model.train_step:
        # Which of its losses belongs to which, only the model's own step knows.
        return problem + (
            "; ".join(f"`model.{n} = mp.LossScaleOptimizer(model.{n})`" for n in bare)
            + ", and in `train_step` take the gradients of "
            f"`self.{bare[0]}.scale_loss(loss)`."
        )
    if any(optimizers.values()):
        return None
    return problem + "`model.compile(mp.LossScaleOptimizer(model.optimizer), ...)`."


def scaling_optimizer(
    model: keras.Model, optimizer, initial_scale: float | None = None
):
    """Return `optimizer`, wrapped in ours if `model` needs it and it is bare.

    Args:
        model: The model.
        optimizer: Its optimizer, or what names one.
        initial_scale: Float, the first loss scale. Defaults to the wrapper's default.
    """
    from keras_mixprec.optimizer import LossScaleOptimizer

    if optimizer is None or not computes_in_float16(model):
        return optimizer
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    scale = {} if initial_scale is None else {"initial_scale": initial_scale}
    scaling = LossScaleOptimizer(optimizer, name="loss_scale_optimizer", **scale)
    if optimizer.built:
        # Else a file saved before the next step would hold an optimizer half built,
        # whose state Keras does not load.
        scaling.build(model.trainable_variables)
    return scaling
