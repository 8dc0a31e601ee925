"""In `fit` a skipped step leaves nothing behind, and an epoch is honest."""

import keras
import numpy as np
import pytest
from keras import ops
from support import SCALING
from support import SLOW_ON_JAX
from support import assert_finite
from support import assert_same_bits
from support import classifier
from support import compiled
from support import data
from support import half_classifier
from support import snapshot

import keras_mixprec as mp

TORCH = keras.backend.backend() == "torch"
MODES = [{}, pytest.param({"run_eagerly": True}, marks=SLOW_ON_JAX)]
if not TORCH:
    MODES += [{"jit_compile": True}, {"steps_per_execution": 2}]


def fit(model, x, y, **kwargs):
    kwargs = {"epochs": 1, "batch_size": 32, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(x, y, **kwargs).history


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_forward_overflow_leaves_all_state_as_it_was(mode):
    model = half_classifier(keras.optimizers.AdamW(0.01), **mode)
    x, y = data(64)
    fit(model, x, y)
    before = snapshot(model, model.optimizer)
    model.train_on_batch(np.full((32, 8), 1e6, "float32"), y[:32])
    after = snapshot(model, model.optimizer)
    assert model.optimizer.overflow_count == 1
    assert_finite(after)
    # `train_on_batch` starts its metrics anew.
    assert_same_bits(before, after, but=(*SCALING, "loss/", "accuracy/"))


def test_train_on_batch_returns_nan_for_a_skipped_batch():
    model = half_classifier()
    x, y = data(32)
    assert np.isfinite(model.train_on_batch(x, y)).all()
    assert np.isnan(model.train_on_batch(x * np.nan, y)).all()
    logs = model.train_on_batch(x * np.nan, y, return_dict=True)
    assert set(logs) == {"loss", "accuracy"} and np.isnan(list(logs.values())).all()


def test_seeds_advance_over_a_skipped_step():
    model = half_classifier()
    x, y = data(32)
    model.train_on_batch(x, y)
    seed = [v for v in model.non_trainable_variables if "seed" in v.path]
    before = snapshot(seed)
    model.train_on_batch(np.full((32, 8), np.nan, "float32"), y)
    assert (
        list(snapshot(seed).values())[0].tobytes() != list(before.values())[0].tobytes()
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_epoch_is_the_mean_over_applied_steps(mode):
    x, y = data(128, bad=range(32, 64))
    model = half_classifier(keras.optimizers.SGD(0.0), **mode)
    history = fit(model, x, y, callbacks=[keras.callbacks.TerminateOnNaN()], epochs=2)
    assert len(history["loss"]) == 2
    assert model.optimizer.overflow_count == 2
    assert_finite(snapshot(model, model.optimizer))
    clean = half_classifier(keras.optimizers.SGD(0.0), **mode)
    clean.set_weights([ops.convert_to_numpy(w) for w in model.weights])
    good = np.r_[0:32, 64:128]
    reference = model.evaluate(x[good], y[good], batch_size=32, verbose=0)
    assert np.isfinite(reference).all()
    # SGD(0) trains statistics only, and Dropout draws: the same magnitude, not NaN.
    assert abs(history["loss"][1] - reference[0]) < 0.5


def test_loss_counts_only_applied_samples():
    x, y = data(96, bad=range(32, 64))
    model = half_classifier()
    fit(model, x, y)
    tracker = next(m for m in model.metrics if m.name == "loss")
    assert float(ops.convert_to_numpy(tracker.count)) == 64


def test_an_epoch_without_an_applied_step_is_nan_and_says_why():
    x, y = data(64)
    model = half_classifier()
    fit(model, x, y)
    with pytest.warns(UserWarning, match="Epoch 2: all 2 steps overflowed.*scale"):
        history = fit(model, x * np.nan, y, epochs=2, initial_epoch=1)
    assert np.isnan(history["loss"]).all()
    assert np.isnan(history["accuracy"]).all()


@pytest.mark.filterwarnings("ignore:Epoch")
def test_early_stopping_does_not_take_a_skipped_epoch_for_the_best():
    x, y = data(64)
    model = half_classifier()
    stopper = keras.callbacks.EarlyStopping("loss", patience=5)
    fit(model, x * np.nan, y, callbacks=[stopper])
    assert stopper.best is None or not stopper.best < 0.1


def test_500_bad_steps_in_fit():
    model = half_classifier()
    x, y = data(32)
    fit(model, x, y)
    before = snapshot(model)
    batches = np.full((500 * 4, 8), np.inf, "float32"), np.zeros(2000, "int32")
    with pytest.warns(UserWarning, match="all 500 steps"):
        fit(model, *batches, batch_size=4)
    assert_same_bits(before, snapshot(model), but=(*SCALING, "loss", "accuracy"))
    assert float(model.optimizer.loss_scale) == 2.0**-14
    fit(model, x, y)
    assert model.optimizer.consecutive_overflows == 0
    assert_finite(snapshot(model, model.optimizer))


def test_frozen_weights_and_statistics_stay():
    model = half_classifier()
    model.layers[0].trainable = False
    compiled(model, mp.LossScaleOptimizer("sgd"))
    x, y = data(64, bad=range(32, 64))
    before = snapshot(model.layers[0].variables)
    fit(model, x, y)
    assert_same_bits(before, snapshot(model.layers[0].variables))
    assert_finite(snapshot(model))


class Net(keras.Model):
    """A subclassed model whose train step forgets, or not, to scale the loss."""

    def __init__(self, scales):
        super().__init__()
        self.scales = scales
        self.dense = keras.layers.Dense(1)

    def call(self, x, training=False):
        return self.dense(x)


def _tensorflow_step(self, batch):
    import tensorflow as tf

    x, y = batch
    with tf.GradientTape() as tape:
        loss = ops.mean(ops.square(self(x, training=True) - y))
        scaled = self.optimizer.scale_loss(loss) if self.scales else loss
    grads = tape.gradient(scaled, self.trainable_variables)
    self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
    return {"custom": loss}


def _torch_step(self, batch):
    x, y = batch
    self.zero_grad()
    loss = ops.mean(ops.square(self(x, training=True) - y))
    (self.optimizer.scale_loss(loss) if self.scales else loss).backward()
    weights = self.trainable_variables
    self.optimizer.apply([v.value.grad for v in weights], weights)
    return {"custom": loss.detach()}


def _jax_step(self, state, batch):
    import jax

    x, y = batch
    trainable, rest, optimizer, metrics = state

    def scaled(values):
        prediction, _ = self.stateless_call(values, rest, x, training=True)
        loss = ops.mean(ops.square(prediction - y))
        if not self.scales:
            return loss, loss
        return self.optimizer.stateless_scale_loss(optimizer, loss), loss

    (_, loss), grads = jax.value_and_grad(scaled, has_aux=True)(trainable)
    trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
    return {"custom": loss}, (trainable, rest, optimizer, metrics)


Net.train_step = {
    "tensorflow": _tensorflow_step,
    "torch": _torch_step,
    "jax": _jax_step,
}[keras.backend.backend()]


def train_custom(scales, optimizer):
    keras.utils.set_random_seed(0)
    model = Net(scales)
    model(np.zeros((1, 4), "float32"))
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    model.compile(optimizer)
    model.fit(x, x.sum(1, keepdims=True), epochs=2, verbose=0)
    return model


def test_a_custom_train_step_that_forgets_to_scale_is_told_so():
    with pytest.raises(ValueError, match="has not scaled a loss.*scale_loss"):
        train_custom(False, mp.LossScaleOptimizer("sgd"))


def test_a_custom_train_step_that_scales_trains_as_without_scaling():
    scaled = train_custom(True, mp.LossScaleOptimizer(keras.optimizers.SGD(0.125)))
    plain = train_custom(False, keras.optimizers.SGD(0.125))
    for left, right in zip(scaled.weights, plain.weights, strict=True):
        left, right = ops.convert_to_numpy(left), ops.convert_to_numpy(right)
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_attaching_twice_wraps_once():
    model = half_classifier()
    step, fit_method = model.train_step.__wrapped__, model.fit
    compiled(model)
    assert model.train_step.__wrapped__ == step
    assert model.fit is fit_method


def test_a_float32_model_is_left_alone():
    model = compiled(classifier(), "sgd")
    assert not {"train_step", "fit", "train_on_batch"} & set(vars(model))


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="nor does it run in plain Keras on JAX"
)
def test_a_metric_of_a_nested_layer_is_rolled_back_once():
    class Inner(keras.layers.Layer):
        def __init__(self):
            # Elsewhere torch would write into a cast copy of the metric's state.
            super().__init__(dtype="float32")
            self.seen = keras.metrics.Mean(name="seen")

        def call(self, x):
            self.seen.update_state(1.0)
            return x

    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__(dtype="float32")
            self.inner = Inner()

        def call(self, x):
            return self.inner(x)

    with mp.policy_scope("mixed_float16"):
        layers = [Outer(), keras.layers.Dense(1, dtype="float32")]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile("sgd", "mse", auto_scale_loss=True)
        x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
        fit(
            model,
            np.stack([x, x * np.nan, x]).reshape(24, 4),
            np.tile(y, (3, 1)),
            batch_size=8,
        )
    assert model.optimizer.overflow_count == 1
    seen = layers[0].inner.seen
    assert [float(ops.convert_to_numpy(v)) for v in seen.variables] == [2.0, 2.0]


def test_float16_weights_that_overflow_in_the_update_are_a_skipped_step():
    layers = [
        keras.layers.BatchNormalization(),
        keras.layers.Dense(4, dtype="float16"),
        keras.layers.Dense(1, dtype="float32"),
    ]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(1e6), 1.0), "mse")
    x, y = np.ones((4, 8), "float32"), np.ones((4, 1), "float32")
    model.train_on_batch(x, y)  # Builds the optimizer, and is skipped as well.
    before = snapshot(model, model.optimizer)
    assert np.isnan(model.train_on_batch(x, y))
    after = snapshot(model, model.optimizer)
    assert_same_bits(before, after, but=(*SCALING, "loss/"))
    counts = model.optimizer.overflow_counts
    blamed = [path for path, n in counts.items() if n == 2]
    assert blamed == [v.path for v in layers[1].trainable_variables]
