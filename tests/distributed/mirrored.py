"""MirroredStrategy on GPUs where there are enough, else on logical CPU devices.

python mirrored.py survive REPLICAS INNER
python mirrored.py curves REPLICAS INNER...
python mirrored.py accumulate REPLICAS
python mirrored.py xla REPLICAS
"""

import sys

import faults
import keras
import numpy as np
import tensorflow as tf

import keras_mixprec as mp


def devices(replicas):
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) >= replicas:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        # Curves are compared closer than TF32 computes.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        return [f"GPU:{i}" for i in range(replicas)]
    # Or the functions that are not under the strategy would run on what there is.
    tf.config.set_visible_devices([], "GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, logical)
    return [f"CPU:{i}" for i in range(replicas)]


class Trainer:
    """A model in `fit` under a strategy.

    Args:
        strategy: `tf.distribute.Strategy`.
        inner: A key of `faults.INNER`.
        jit_compile: Bool or `"auto"`. Defaults to Keras's choice.
        net: Keyword arguments of `faults.net`.
    """

    def __init__(self, strategy, inner, jit_compile="auto", **net):
        keras.utils.set_random_seed(0)
        self.strategy = strategy
        with strategy.scope():
            self.model = faults.net(**net)
            self.optimizer = faults.optimizer(inner)
            self.model.compile(
                self.optimizer,
                "sparse_categorical_crossentropy",
                jit_compile=jit_compile,
            )

    def run(self, x, y, weights, epochs=1):
        batches = tf.data.Dataset.from_tensor_slices((x, y, weights))
        batches = batches.batch(faults.BATCH)
        return self.model.fit(batches, epochs=epochs, verbose=0).history["loss"]

    def state(self):
        """Path -> the copies of a variable; BatchNormalization's are each its own."""
        owned = [*self.model.trainable_variables, *self.optimizer.variables]
        local = self.strategy.experimental_local_results
        return {
            f"{i} {v.path}": [np.asarray(c) for c in local(v.value)]
            for i, v in enumerate(owned)
        }


def survive(replicas, inner):
    strategy = tf.distribute.MirroredStrategy(devices(replicas))
    if tf.config.list_logical_devices("GPU"):
        # Rows of an embedding's gradient are summed in no fixed order there, so that
        # the replicas' copies of it part.
        tf.config.experimental.enable_op_determinism()
    trainer = Trainer(strategy, inner, embedding=True)
    faults.survive(trainer, trainer.optimizer, replicas)
    x, y, weights = faults.batches(2)
    assert np.isfinite(trainer.model.evaluate(x, y, verbose=0))


def xla(replicas):
    """Where TensorFlow compiles a step it survives; where it cannot, we say so."""
    names = devices(replicas)
    for strategy in (
        tf.distribute.OneDeviceStrategy(names[0]),
        tf.distribute.MirroredStrategy(names[:1]),
    ):
        for jit_compile in (True, False):
            trainer = Trainer(strategy, "all", jit_compile)
            assert trainer.model.jit_compile is jit_compile
            faults.survive(trainer, trainer.optimizer, 1)
    strategy = tf.distribute.MirroredStrategy(names)
    try:
        Trainer(strategy, "all", True)
    except ValueError as error:
        assert "`jit_compile` must be False" in str(error), error
        print("refused", flush=True)
    try:
        compiled_loop(strategy)
    except ValueError as error:
        assert "XLA cannot compile what each of several GPUs runs" in str(error), error
        print("refused", flush=True)


def compiled_loop(strategy):
    """A step of one's own, of which XLA compiles what each replica runs.

    On CPUs TensorFlow does not let it: the strategy is told that it does.
    """
    trainer = Trainer(strategy, "plain", False)
    with strategy.scope():
        # Now, because variables cannot be created while a step is traced.
        trainer.optimizer.build(trainer.model.trainable_variables)
    gpus = bool(tf.config.list_logical_devices("GPU"))
    if not gpus:
        type(strategy.extended)._use_merge_call = lambda extended: False
    replica_step = tf.function(trainer.model.train_step, jit_compile=gpus)
    batch = tuple(map(tf.constant, faults.batches(1)))
    tf.function(lambda: strategy.run(replica_step, args=(batch,)))()


def curves(replicas, *inners):
    """The loss of each epoch on one device and on all, from the same seed."""
    names = devices(replicas)
    for inner in inners:
        losses = [
            curve(tf.distribute.MirroredStrategy(names), inner),
            curve(tf.distribute.OneDeviceStrategy(names[0]), inner),
            curve(tf.distribute.get_strategy(), inner),
        ]
        np.testing.assert_allclose(losses[0], losses[2], rtol=1e-4)
        np.testing.assert_allclose(losses[1], losses[2], rtol=1e-6)
        assert losses[2][-1] < 0.9 * losses[2][0], losses[2]
        print("same curve with", inner, losses[0], flush=True)
    half = [
        curve(strategy, "plain", "mixed_float16")
        for strategy in (
            tf.distribute.MirroredStrategy(names),
            tf.distribute.get_strategy(),
        )
    ]
    faults.check_half_curves(*half)


def curve(strategy, inner, dtype="float32"):
    trainer = Trainer(strategy, inner, dtype=dtype, batch_normalization=False)
    return trainer.run(*faults.batches(8), epochs=4)


def accumulate(replicas):
    """By hand: SGD at rate 1 over two steps, gradients that differ per replica."""
    strategy = tf.distribute.MirroredStrategy(devices(replicas))
    with strategy.scope():
        weight = keras.Variable([0.0], name="weight")
        inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
        optimizer = mp.LossScaleOptimizer(inner, initial_scale=1.0)
        optimizer.build([weight])

    @tf.function
    def step(grads):
        strategy.run(lambda g: optimizer.apply([g], [weight]), args=(grads,))

    # The third overflows on the last replica only, and counts for nothing.
    for grads in ([1, 2], [4, 1], [0, np.inf], [8, 0], [0, 16]):
        each = [tf.constant([float(g)]) for g in grads]
        step(
            strategy.experimental_distribute_values_from_function(
                lambda context, each=each: each[context.replica_id_in_sync_group]
            )
        )
    copies = [np.asarray(c) for c in strategy.experimental_local_results(weight.value)]
    # (1 + 2 + 4 + 1) / 2, then, at half the scale, 2 * (8 + 16) / 2.
    assert [float(c[0]) for c in copies] == [-4.0 - 24.0] * replicas, copies
    assert optimizer.overflow_count == 1 and optimizer.loss_scale == 0.5
    print("exact", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](int(sys.argv[2]), *sys.argv[3:])
