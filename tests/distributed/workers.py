"""MultiWorkerMirroredStrategy: several processes on loopback, each one replica.

TF_CONFIG=.. python workers.py survive INNER
TF_CONFIG=.. python workers.py curves INNER...
TF_CONFIG=.. python workers.py watched FOLDER EPOCHS
TF_CONFIG=.. python workers.py dying FOLDER VICTIM
TF_CONFIG=.. python workers.py monitored FOLDER
TF_CONFIG=.. python workers.py refused
TF_CONFIG=.. python workers.py collectives
"""

import collections
import hashlib
import json
import os
import sys

import faults
import keras
import numpy as np
import tensorflow as tf
from tensorflow_workers import make_step
from tensorflow_workers import train


class Trainer:
    """A model in the loop of `examples/tensorflow_workers.py`.

    Args:
        strategy: `tf.distribute.Strategy`.
        inner: A key of `faults.INNER`.
        scaled: Whether to scale the loss. Defaults to `True`.
        net: Keyword arguments of `faults.net`.
    """

    def __init__(self, strategy, inner, scaled=True, **net):
        keras.utils.set_random_seed(0)
        self.strategy = strategy
        with strategy.scope():
            self.model = faults.net(**net)
            self.optimizer = faults.optimizer(inner, scaled)
            self.model.compile(
                self.optimizer,
                "sparse_categorical_crossentropy",
                auto_scale_loss=scaled,
            )
            self.optimizer.build(self.model.trainable_variables)
        self.step = make_step(self.model)

    def run(self, x, y, weights, epochs=1, callbacks=()):
        batches = self.distributed(x, y, weights)
        logs = train(self.model, self.step, batches, epochs, callbacks, verbose=False)
        return logs["loss"]

    def distributed(self, *arrays):
        """The arrays in batches, of which each worker takes its part."""
        batches = tf.data.Dataset.from_tensor_slices(arrays)
        return self.strategy.experimental_distribute_dataset(_by_data(batches))

    def state(self):
        """Path -> the copies of a variable; BatchNormalization's are each its own."""
        owned = [*self.model.trainable_variables, *self.optimizer.variables]
        local = self.strategy.experimental_local_results
        return {
            f"{i} {v.path}": [np.asarray(c) for c in local(v.value)]
            for i, v in enumerate(owned)
        }

    def digest(self):
        """A hash of all that should be equal on every worker."""
        data = b"".join(c[0].tobytes() for c in self.state().values())
        return hashlib.sha256(data).hexdigest()


def _by_data(batches):
    # Every worker reads the same arrays and takes its part of each batch.
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    return batches.batch(faults.BATCH).with_options(options)


def workers():
    return len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])


def index():
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def survive(inner):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if tf.config.list_logical_devices("GPU"):
        # As in `mirrored.py`.
        tf.config.experimental.enable_op_determinism()
    trainer = Trainer(strategy, inner, embedding=True)
    faults.survive(trainer, trainer.optimizer, workers())
    statistics = [np.asarray(v) for v in trainer.model.non_trainable_variables]
    assert all(np.isfinite(s).all() for s in statistics)
    print("digest", trainer.digest(), flush=True)


def watched(folder, epochs):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    trainer = Trainer(strategy, "most")
    is_chief = strategy.extended.should_checkpoint
    faults.watched(trainer, folder, int(epochs), is_chief)


def dying(folder, victim):
    """One worker dies in its fifth step, after the forward pass."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    trainer = Trainer(strategy, "most")
    die = faults.dies_in_fifth_call(index() == int(victim))
    compute_loss = trainer.model.compute_loss

    def compute_loss_or_die(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        with tf.control_dependencies([tf.py_function(die, [loss], [])]):
            return tf.identity(loss)

    trainer.model.compute_loss = compute_loss_or_die
    faults.watched(trainer, folder, 4, strategy.extended.should_checkpoint)


def monitored(folder):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def wait():
        ones = strategy.run(lambda: tf.constant(1.0))
        assert float(strategy.reduce("SUM", ones, axis=None)) == workers()

    faults.monitored(Trainer(strategy, "plain"), index(), workers(), wait, folder)


def refused():
    """Keras itself refuses to `fit` on several workers."""
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    try:
        model.fit(np.zeros((8, 8)), np.zeros((8, 1)), verbose=0)
    except ValueError as error:
        assert "PerReplica" in str(error), error
        print("refused", flush=True)


def collectives():
    """Scaling the loss adds nothing to what the workers tell each other."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    found = [
        _collectives(Trainer(strategy, "plain", scaled)) for scaled in (False, True)
    ]
    assert found[0] == found[1] and found[0].total() > 0, found
    print("collectives", dict(found[1]), flush=True)


def _collectives(trainer):
    batch = next(iter(trainer.distributed(*faults.batches(1))))
    graph = trainer.step.get_concrete_function(batch).graph.as_graph_def()
    nodes = [graph.node, *(f.node_def for f in graph.library.function)]
    return collections.Counter(
        n.op for each in nodes for n in each if n.op.startswith("Collective")
    )


def curves(*inners):
    """The loss of each epoch on one device and on all workers, from the same seed."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    for inner in inners:
        alone = curve(tf.distribute.get_strategy(), inner)
        together = curve(strategy, inner)
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        assert alone[-1] < 0.9 * alone[0], alone
        print("same curve with", inner, together, flush=True)
    half = [
        curve(each, "plain", "mixed_float16")
        for each in (strategy, tf.distribute.get_strategy())
    ]
    faults.check_half_curves(*half)


def curve(strategy, inner, dtype="float32"):
    trainer = Trainer(strategy, inner, dtype=dtype, batch_normalization=False)
    return trainer.run(*faults.batches(8), epochs=4)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
