"""What Keras's own loss scaling gets wrong: each test fails on it and passes on ours.

The numbers are those of the table of defects in docs/why.md.
"""

import keras
import numpy as np
import pytest
from keras import ops
from support import SLOW_ON_JAX
from support import STATELESS
from support import assert_finite
from support import classifier
from support import compiled
from support import data
from support import half_classifier
from support import snapshot
from support import tensors
from support import variables

import keras_mixprec as mp
from keras_mixprec import compile_hook

BACKEND = keras.backend.backend()


def on_both(reason):
    """Run a test on ours, and on Keras's own, where it must fail."""
    theirs = pytest.param(
        keras.optimizers.LossScaleOptimizer,
        marks=[pytest.mark.xfail(reason=reason, strict=True), *SLOW_ON_JAX],
        id="keras",
    )
    return pytest.mark.parametrize(
        "wrapper", [pytest.param(mp.LossScaleOptimizer, id="ours"), theirs]
    )


def step(optimizer, grads, weights):
    """One step on every backend: Keras's wrapper cannot `apply` on JAX."""
    if BACKEND != "jax":
        optimizer.apply(tensors(*grads), weights)
        return
    new, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        tensors(*grads),
        [v.value for v in weights],
    )
    for variable, value in zip(
        [*weights, *optimizer.variables], [*new, *state], strict=True
    ):
        variable.assign(value)


def built(wrapper, weights, **kwargs):
    optimizer = wrapper(keras.optimizers.SGD(0.5), **kwargs)
    optimizer.build(weights)
    return optimizer


def half_model(wrapper, model=None, optimizer="adam", **kwargs):
    """Compiled as plain Keras does it, or with ours."""
    model = model or classifier(dtype="mixed_float16")
    if wrapper is keras.optimizers.LossScaleOptimizer:
        compile_hook.remove()
    return compiled(model, wrapper(keras.optimizers.get(optimizer)), **kwargs)


def fit(model, x, y, **kwargs):
    kwargs = {"batch_size": 32, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(x, y, **kwargs).history


@on_both("the scale reaches 0, and a clean step divides 0 by it")
def test_row_1_a_run_of_bad_steps(wrapper):
    weights = variables([1.0])
    optimizer = built(wrapper, weights)
    for _ in range(170):
        step(optimizer, [[np.inf]], weights)
    scale = float(ops.convert_to_numpy(optimizer.scale_loss(1.0)))
    step(optimizer, [[scale * 1.0]], weights)
    assert np.isfinite(ops.convert_to_numpy(weights[0])).all()


@on_both("statistics are written before the step is skipped")
def test_row_3_batch_normalization_statistics(wrapper):
    model = half_model(wrapper)
    fit(model, *data(64, bad=range(32, 64)))
    assert_finite(snapshot(model.weights))
    assert np.isfinite(model.evaluate(*data(64), verbose=0)).all()


@on_both("the scale has no ceiling and reaches inf")
def test_row_4_growth_without_end(wrapper):
    weights = variables([1.0])
    optimizer = built(wrapper, weights, dynamic_growth_steps=1)
    for _ in range(120):
        step(optimizer, [[1.0]], weights)
    scale = float(ops.convert_to_numpy(optimizer.scale_loss(1.0)))
    assert np.isfinite(scale)


@pytest.mark.skipif(
    BACKEND == "jax", reason="Keras's train_step on JAX has no such hole"
)
@on_both("gradients are divided by 32768 all the same")
def test_row_5_a_custom_loop_that_forgets_to_scale(wrapper):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = wrapper(keras.optimizers.SGD(0.5))
    grads = tensors([[1.0]], [1.0])
    with pytest.raises(ValueError, match="has not scaled a loss"):
        optimizer.apply(grads, model.trainable_variables)


def nested():
    inner = classifier(dtype="mixed_float16")
    inputs = keras.Input((8,))
    return keras.Model(inputs, inner(inputs))


def reloaded(tmp_path):
    with mp.policy_scope("mixed_float16"):
        classifier().save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("make", ["nested", "reloaded", "layer"])
def test_row_6_half_precision_inside_a_float32_model(make, hooked, tmp_path):
    if make == "layer":
        model = classifier(dtype="mixed_float16")
    else:
        model = nested() if make == "nested" else reloaded(tmp_path)
    # Not hooked is plain Keras, which the second half of the test shows to fail.
    (compile_hook.install if hooked else compile_hook.remove)()
    compiled(model)
    assert model.dtype_policy.name == "float32"
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == hooked


def test_row_6_layers_built_after_compile_are_noticed():
    class Late(keras.Model):
        def build(self, shape):
            self.dense = keras.layers.Dense(3, dtype="mixed_float16")

        def call(self, x):
            return ops.cast(self.dense(x), "float32")

    mp.set_policy("mixed_float16")
    model = Late(dtype="float32")
    model.compile("sgd", "mse")
    x, _ = data(32)
    with pytest.warns(UserWarning, match="model.compile.mp.LossScaleOptimizer"):
        model.fit(x, x[:, :3], verbose=0)


def test_row_6_pure_float16_is_scaled_too():
    mp.set_policy("mixed_float16")
    model = compiled(classifier(dtype="float16"))
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    fit(model, *data(64))
    assert_finite(snapshot(model, model.optimizer))


@pytest.mark.skipif(BACKEND != "jax", reason="a constant of the trace: JAX alone")
@on_both("`scale_loss` is a constant of the trace")
def test_row_7_the_scale_inside_a_compiled_function(wrapper):
    import jax

    optimizer = built(wrapper, variables([1.0]))

    @jax.jit
    def scaled(state, loss):
        if hasattr(optimizer, "stateless_scale_loss"):
            return optimizer.stateless_scale_loss(state, loss)
        return optimizer.scale_loss(loss)

    state = [v.value for v in optimizer.variables]
    assert float(scaled(state, 1.0)) == 2.0**15
    index = [v is optimizer.dynamic_scale for v in optimizer.variables].index(True)
    state[index] = state[index] / 2
    assert float(scaled(state, 1.0)) == 2.0**14


@on_both("one overflow makes the epoch's loss NaN")
def test_row_8_the_loss_of_an_epoch_with_an_overflow(wrapper):
    model = half_model(wrapper)
    x, y = data(128, bad=range(32, 64))
    stop = keras.callbacks.TerminateOnNaN()
    history = fit(model, x, y, epochs=2, callbacks=[stop])
    assert np.isfinite(history["loss"]).all() and len(history["loss"]) == 2


class Extra(keras.layers.Layer):
    def call(self, x):
        self.add_loss(ops.square(x * 20.0))
        return x


@pytest.mark.filterwarnings("ignore:Epoch")
@on_both("float16 losses overflow in their sum, or do not add to float32")
def test_row_9_extra_losses(wrapper):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, dtype="mixed_float16"),
            Extra(dtype="mixed_float16"),
            keras.layers.Dense(3, "softmax", dtype="float32"),
        ]
    )
    # So slow that gradients of such losses do not throw the weights about.
    half_model(wrapper, model, keras.optimizers.SGD(1e-9))
    x, y = data(32)
    assert np.isfinite(model.evaluate(x, y, verbose=0)).all()
    # Until the scale fits: these losses are large.
    assert np.isfinite(fit(model, x, y, epochs=20)["loss"][-1])


def test_row_11_the_inner_loss_scale_factor_is_not_dropped_silently():
    with pytest.warns(UserWarning, match="`loss_scale_factor=8"):
        mp.LossScaleOptimizer(keras.optimizers.SGD(loss_scale_factor=8.0))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.filterwarnings("ignore:Error in loading the saved optimizer")
@on_both("HDF5 restores the wrapper's variables, not the inner optimizer's")
def test_row_12_training_goes_on_after_hdf5(wrapper, tmp_path):
    model = half_model(wrapper)
    fit(model, *data(64, bad=range(32)))
    model.save(tmp_path / "model.h5")
    again = keras.saving.load_model(tmp_path / "model.h5")
    fit(again, *data(64))
    assert int(ops.convert_to_numpy(again.optimizer.iterations)) == 3
    assert again.optimizer.overflow_count == 1
    assert float(again.optimizer.loss_scale) == 2.0**14


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_row_12_an_hdf5_file_of_another_optimizer_warns():
    optimizer = mp.LossScaleOptimizer("adam")
    optimizer.set_weights([np.zeros(())] * 5)
    with pytest.warns(UserWarning, match="starts from scratch.*Iterations"):
        optimizer.build(variables([1.0]))


@pytest.mark.skipif(BACKEND == "torch", reason="steps_per_execution is 1 on torch")
def test_row_13_every_overflow_is_counted_under_steps_per_execution():
    model = half_classifier(steps_per_execution=8)
    x, y = data(512, bad=[*range(32, 96), *range(320, 352)])
    history = fit(model, x, y, callbacks=[mp.MixedPrecisionMonitor()])
    assert history["overflow_count"] == [3]
    assert model.optimizer.overflow_count == 3


@pytest.mark.skipif(BACKEND != "jax", reason="added up in float32 there")
@on_both("half of the gradient is lost")
def test_row_15_a_row_that_is_looked_up_often(wrapper):
    layer = keras.layers.Embedding(10, 2, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4096,), dtype="int32"), layer])

    def loss(y_true, y_pred):
        return ops.sum(y_true * ops.cast(y_pred, "float32"))

    scaling = wrapper(keras.optimizers.SGD(1.0))
    if wrapper is keras.optimizers.LossScaleOptimizer:
        compile_hook.remove()
    model.compile(scaling, loss)
    layer.embeddings.assign(np.zeros((10, 2)))
    # The scaled gradient of each is 1.
    y = np.full((1, 4096, 2), 2.0**-15)
    model.train_on_batch(np.full((1, 4096), 7), y)
    assert (ops.convert_to_numpy(layer.embeddings)[7] == -(2.0**12) * 2.0**-15).all()


def test_stateless_is_known_to_these_tests():
    assert (BACKEND != "tensorflow") == STATELESS


@pytest.mark.filterwarnings("ignore:Epoch")
def test_row_9_extra_losses_of_a_converted_model():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activity_regularizer=keras.regularizers.L2(100.0)),
            Extra(),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    compiled(model, keras.optimizers.SGD(1e-9))
    x, y = data(32)
    expected = model.evaluate(x, y, verbose=0)[0]
    mp.convert(model)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert abs(model.evaluate(x, y, verbose=0)[0] / expected - 1) < 0.02
    assert np.isfinite(fit(model, x, y, epochs=20)["loss"][-1])
