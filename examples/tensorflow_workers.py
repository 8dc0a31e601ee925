"""Mixed precision on several hosts: MultiWorkerMirroredStrategy in a loop of one's own.

    TF_CONFIG='{"cluster": {"worker": ["host0:2222", "host1:2222"]},
                "task": {"type": "worker", "index": 0}}' \\
        python examples/tensorflow_workers.py

Keras 3 has no `fit` under this strategy. The loop is short, because a compiled model's
`train_step` is all of it: the loss is scaled, gradients are summed over all workers,
and every worker applies or skips the step, BatchNormalization and metrics included.
"""

import argparse
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from chief import ChiefBackup

import keras_mixprec as mp


def make_step(model):
    """Return the train step of all replicas as one TensorFlow function."""

    @tf.function
    def step(batch):
        model.distribute_strategy.run(model.train_step, args=(batch,))

    return step


def train(model, step, batches, epochs, callbacks=(), verbose=True):
    """Train a compiled model under the strategy it was created in.

    Args:
        model: `keras.Model`, compiled.
        step: What `make_step(model)` returned.
        batches: `tf.distribute.DistributedDataset` of `(x, y)` or `(x, y, weight)`.
        epochs: Int.
        callbacks: List of `keras.callbacks.Callback`.
        verbose: Bool, whether the chief prints each epoch's logs.

    Returns:
        Dict of lists, what each epoch logged, as `History.history` holds it.
    """
    is_chief = model.distribute_strategy.extended.should_checkpoint
    callbacks = keras.callbacks.CallbackList(
        list(callbacks), add_history=True, model=model
    )
    callbacks.on_train_begin()
    for epoch in range(model._initial_epoch or 0, epochs):
        model.reset_metrics()
        callbacks.on_epoch_begin(epoch)
        for i, batch in enumerate(batches):
            callbacks.on_train_batch_begin(i)
            step(batch)
        # Sums over the workers, so that all of them have to ask.
        logs = {k: float(v) for k, v in model.get_metrics_result().items()}
        callbacks.on_epoch_end(epoch, logs)
        if verbose and is_chief:
            last = {k: v[-1] for k, v in model.history.history.items()}
            print(f"epoch {epoch + 1}:", last, flush=True)
    callbacks.on_train_end()
    return model.history.history


def net(width):
    """Return a classifier with a hidden layer of `width` units."""
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, activation="softmax", dtype="float32"),
        ]
    )


def main(epochs, backup, full=False):
    # Before anything else: it starts the server that the other workers wait for.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    mp.set_policy("mixed_float16")
    samples, width, batch = (2**20, 4096, 8192) if full else (512, 32, 64)
    with strategy.scope():
        model = net(width)
        model.compile(mp.LossScaleOptimizer("adam"), "sparse_categorical_crossentropy")
        # Now, because variables cannot be created while a step is traced.
        model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)
    is_chief = strategy.extended.should_checkpoint
    callbacks = [mp.MixedPrecisionMonitor(), ChiefBackup(backup, is_chief)]
    batches = strategy.experimental_distribute_dataset(batches)
    train(model, make_step(model), batches, epochs, callbacks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="a million samples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--backup", default=tempfile.mkdtemp())
    main(**vars(parser.parse_args()))
