"""Custom loops, several optimizers in one model, and what a killed run resumes with."""

import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from processes import ROOT
from processes import search_path
from support import assert_finite
from support import classifier
from support import data
from support import half_classifier
from support import snapshot

import keras_mixprec as mp

BACKEND = keras.backend.backend()


def sparse_loss(y, prediction):
    return ops.mean(keras.losses.sparse_categorical_crossentropy(y, prediction))


def tensorflow_loop(model, optimizer, batches):
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(sparse_loss(y, model(x, training=True)))
        weights = model.trainable_variables
        grads = tape.gradient(scaled, weights)
        optimizer.apply_gradients(zip(grads, weights, strict=True))

    for x, y in batches:
        step(tf.constant(x), tf.constant(y))


def torch_loop(model, optimizer, batches):
    for x, y in batches:
        model.zero_grad()
        loss = sparse_loss(ops.convert_to_tensor(y), model(x, training=True))
        optimizer.scale_loss(loss).backward()
        weights = model.trainable_variables
        optimizer.apply([v.value.grad for v in weights], weights)


def jax_loop(model, optimizer, batches):
    import jax

    @jax.jit
    def step(state, x, y):
        trainable, rest, slots = state

        def scaled(values):
            prediction, new = model.stateless_call(values, rest, x, training=True)
            loss = sparse_loss(y, prediction)
            return optimizer.stateless_scale_loss(slots, loss), new

        (_, rest), grads = jax.value_and_grad(scaled, has_aux=True)(trainable)
        return *optimizer.stateless_apply(slots, grads, trainable), rest

    state = [
        [v.value for v in owned]
        for owned in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]
    for x, y in batches:
        trainable, slots, rest = step(state, x, y)
        state = [trainable, rest, slots]
    owners = (model.trainable_variables, model.non_trainable_variables)
    for owned, values in zip((*owners, optimizer.variables), state, strict=True):
        for variable, value in zip(owned, values, strict=True):
            variable.assign(value)


LOOP = {"tensorflow": tensorflow_loop, "torch": torch_loop, "jax": jax_loop}[BACKEND]


def test_a_custom_loop_skips_counts_and_learns():
    model = classifier(dtype="mixed_float16")
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    optimizer.build(model.trainable_variables)
    x, y = data(96, bad=range(32, 64))
    batches = [(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)]
    LOOP(model, optimizer, batches * 2)
    assert optimizer.overflow_count == 2
    assert float(optimizer.loss_scale) == 2.0**13
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 4
    assert_finite(snapshot(model.trainable_variables, optimizer))


class Pair(keras.Model):
    """Two nets with an optimizer each, as a GAN has them; the second one overflows."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(1, dtype="mixed_float16")
        self.second = keras.layers.Dense(1, dtype="mixed_float16")

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return ops.cast(self.first(x) + self.second(x), "float32")

    def compile(self, first_optimizer, second_optimizer):
        super().compile()
        self.first_optimizer = first_optimizer
        self.second_optimizer = second_optimizer

    def losses_of(self, x, y):
        first = ops.mean(ops.square(ops.cast(self.first(x), "float32") - y))
        second = ops.mean(ops.square(ops.cast(self.second(x * 1e6), "float32") - y))
        return first, second

    def parts(self):
        return (
            (self.first_optimizer, self.first.trainable_variables),
            (self.second_optimizer, self.second.trainable_variables),
        )


def _pair_step_tensorflow(self, batch):
    import tensorflow as tf

    x, y = batch
    with tf.GradientTape(persistent=True) as tape:
        losses = self.losses_of(x, y)
        scaled = [
            o.scale_loss(loss)
            for (o, _), loss in zip(self.parts(), losses, strict=True)
        ]
    for (optimizer, weights), loss in zip(self.parts(), scaled, strict=True):
        optimizer.apply(tape.gradient(loss, weights), weights)
    return {"first": losses[0]}


def _pair_step_torch(self, batch):
    x, y = batch
    self.zero_grad()
    losses = self.losses_of(x, y)
    for (optimizer, weights), loss in zip(self.parts(), losses, strict=True):
        optimizer.scale_loss(loss).backward()
        optimizer.apply([v.value.grad for v in weights], weights)
    return {"first": losses[0].detach()}


@pytest.mark.skipif(
    BACKEND == "jax", reason="Keras's JAX trainer carries one optimizer's state"
)
def test_a_model_with_two_optimizers_decides_for_each(monkeypatch):
    steps = {"tensorflow": _pair_step_tensorflow, "torch": _pair_step_torch}
    monkeypatch.setattr(Pair, "train_step", steps[BACKEND], raising=False)
    model = Pair()
    model.compile(
        *(mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), 256.0) for _ in "ab")
    )
    x, _ = data(64)
    model.build(x.shape)
    before = snapshot(model.second.variables)
    start = snapshot(model.first.variables)
    history = model.fit(
        x, x[:, :1], verbose=0, callbacks=[mp.MixedPrecisionMonitor()], batch_size=32
    ).history
    assert model.first_optimizer.overflow_count == 0
    assert model.second_optimizer.overflow_count == 2
    assert history["second_optimizer_overflow_count"] == [2]
    assert history["first_optimizer_loss_scale"] == [256.0]
    after = snapshot(model.second.variables)
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    moved = snapshot(model.first.variables)
    assert any(start[k].tobytes() != moved[k].tobytes() for k in start)


@pytest.mark.skipif(BACKEND != "jax", reason="what JAX has instead")
def test_two_optimizers_in_one_jax_loop_decide_for_each():
    import jax

    nets = [keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)]) for _ in "ab"]
    optimizers = [mp.LossScaleOptimizer(keras.optimizers.SGD(0.1)) for _ in "ab"]
    x, _ = data(32)
    for net, optimizer, factor in zip(nets, optimizers, (1.0, np.inf), strict=True):
        optimizer.build(net.trainable_variables)
        weights = [v.value for v in net.trainable_variables]
        slots = [v.value for v in optimizer.variables]

        def loss(w, net=net, optimizer=optimizer, slots=slots, factor=factor):
            prediction, _ = net.stateless_call(w, [], x)
            mean = ops.mean(prediction) * factor
            return optimizer.stateless_scale_loss(slots, mean)

        new, slots = optimizer.stateless_apply(slots, jax.grad(loss)(weights), weights)
        for v, value in zip(optimizer.variables, slots, strict=True):
            v.assign(value)
        same = all(bool((a == b).all()) for a, b in zip(new, weights, strict=True))
        assert same == (factor == np.inf)
    assert [o.overflow_count for o in optimizers] == [0, 1]


def test_keras_file_keeps_scale_counters_iterations_and_weights(tmp_path):
    model = half_classifier()
    x, y = data(96, bad=range(32, 64))
    fit = {"batch_size": 32, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=2, **fit)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, mp.LossScaleOptimizer)
    left, right = snapshot(model.optimizer), snapshot(again.optimizer)
    for a, b in zip(left.values(), right.values(), strict=True):
        assert a.tobytes() == b.tobytes()
    assert again.optimizer.overflow_count == 2


# Of the inner optimizer, whose state the wrapper has taken already.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer 'adam")
@pytest.mark.parametrize("built", [False, True])
def test_weights_file_keeps_scale_counters_iterations_and_weights(built, tmp_path):
    model = half_classifier(dropout=0.0)
    x, y = data(96, bad=range(32, 64))
    fit = {"batch_size": 32, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=2, **fit)
    model.save_weights(tmp_path / "model.weights.h5")
    again = half_classifier(dropout=0.0)
    if built:
        again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "model.weights.h5")
    for m in (model, again):
        m.fit(x, y, **fit)
    left = snapshot(model.weights, model.optimizer)
    right = snapshot(again.weights, again.optimizer)
    for a, b in zip(left.values(), right.values(), strict=True):
        assert a.tobytes() == b.tobytes()
    assert again.optimizer.overflow_count == 3


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own checkpoints")
@pytest.mark.parametrize("theirs", [False, True])
def test_tensorflow_checkpoint_keeps_the_state(theirs, tmp_path):
    import tensorflow as tf

    weights = [keras.Variable([1.0], name="w")]
    wrapper = keras.optimizers.LossScaleOptimizer if theirs else mp.LossScaleOptimizer
    first = wrapper(keras.optimizers.Adam(), dynamic_growth_steps=2)
    first.build(weights)
    for grad in (1.0, np.inf, 1.0):
        first.apply([tf.constant([grad])], weights)
    path = tf.train.Checkpoint(optimizer=first).save(str(tmp_path / "checkpoint"))
    second = mp.LossScaleOptimizer(keras.optimizers.Adam(), dynamic_growth_steps=2)
    second.build(weights)
    tf.train.Checkpoint(optimizer=second).restore(path).expect_partial()
    assert float(second.loss_scale) == 2.0**14
    assert int(second.iterations) == 2
    assert int(second.step_counter) == 1
    assert second.overflow_count == (0 if theirs else 1)


RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import keras, numpy as np
from support import data, half_classifier, snapshot
import keras_mixprec as mp

class Die(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if {die} and self.model.optimizer.overflow_count == 2 and batch == 1:
            os.kill(os.getpid(), signal.{signal})

keras.utils.set_random_seed(0)
model = half_classifier(dropout=0.0)
x, y = data(128, bad=range(32, 64))
backup = keras.callbacks.BackupAndRestore({folder!r})
model.fit(x, y, epochs=4, batch_size=32, shuffle=False, verbose=0,
          callbacks=[backup, Die()])
state = snapshot(model.weights, model.optimizer).items()
np.savez({result!r}, **{{k.replace("/", "|"): v for k, v in state}})
"""


def run(folder, result, die):
    code = RUN.format(
        tests=str(pathlib.Path(__file__).parent),
        folder=str(folder),
        result=str(result),
        die=die,
        signal="SIGKILL" if hasattr(signal, "SIGKILL") else "SIGTERM",
    )
    environment = os.environ | {"PYTHONPATH": search_path(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_ends_as_one_that_was_not(tmp_path):
    killed = run(tmp_path / "a", tmp_path / "resumed.npz", True)
    assert killed.returncode == -9, killed.stderr
    for folder, name, die in (("a", "resumed", False), ("b", "whole", False)):
        done = run(tmp_path / folder, tmp_path / f"{name}.npz", die)
        assert done.returncode == 0, done.stderr
    resumed = np.load(tmp_path / "resumed.npz")
    whole = np.load(tmp_path / "whole.npz")
    assert len(resumed.files) == len(whole.files)
    counters = [n for n in whole.files if n.endswith("|overflow_count")]
    assert len(counters) == 1 and whole[counters[0]] == 4
    for name, again in zip(whole.files, resumed.files, strict=True):
        np.testing.assert_allclose(resumed[again], whole[name], rtol=1e-6)
