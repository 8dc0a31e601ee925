"""Mixed precision with parameter servers: asynchronous, in a loop of one's own.

    TF_CONFIG='{"cluster": {"chief": ["a:1"], "ps": ["b:1"], "worker": ["c:1"]},
                "task": {"type": "chief", "index": 0}}' \\
        python examples/tensorflow_parameter_server.py

Keras 3 has no `fit` under `ParameterServerStrategy`. Workers do not wait for each
other, so there is no step that is common to all: each worker decides for itself, and
the weights, the loss scale and the counters that all share live on the servers.
"""

import argparse
import json
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import keras_mixprec as mp


def net(width):
    """Return a classifier with a hidden layer of `width` units."""
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(3, activation="softmax", dtype="float32"),
        ]
    )


def make_step(strategy, model, optimizer, loss_fn):
    """Return one worker's step: gradients, then the update or the skip."""

    def on_replica(x, y, weights=None):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True), weights)
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    @tf.function
    def step(iterator):
        return strategy.run(on_replica, args=next(iterator))

    return step


def train(strategy, datasets, steps, optimizer="adam", width=32):
    """Train a net on the workers of the cluster.

    Args:
        strategy: `tf.distribute.ParameterServerStrategy`.
        datasets: Callable without arguments that returns a worker's `tf.data.Dataset`
            of `(x, y)` or `(x, y, weight)`.
        steps: Int, steps of all workers together.
        optimizer: The inner optimizer or its name. Defaults to `"adam"`.
        width: Int, units of the hidden layer. Defaults to `32`.

    Returns:
        The model, the optimizer and the list of losses.
    """
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope(), mp.policy_scope("mixed_float16"):
        model = net(width)
        optimizer = mp.LossScaleOptimizer(optimizer)
        optimizer.build(model.trainable_variables)
    loss_fn = keras.losses.SparseCategoricalCrossentropy()
    step = make_step(strategy, model, optimizer, loss_fn)
    iterator = iter(coordinator.create_per_worker_dataset(datasets))
    results = [coordinator.schedule(step, args=(iterator,)) for _ in range(steps)]
    coordinator.join()
    return model, optimizer, [float(r.fetch()) for r in results]


def dataset():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int64") + (x[:, 1] > 0)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(32).repeat()


def serve():
    """Be a worker or a parameter server until the process is ended."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    server = tf.distribute.Server(
        resolver.cluster_spec(),
        job_name=resolver.task_type,
        task_index=resolver.task_id,
        protocol="grpc",
    )
    server.join()


def main(steps, full=False):
    if json.loads(os.environ["TF_CONFIG"])["task"]["type"] != "chief":
        serve()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    keras.utils.set_random_seed(0)
    width = 4096 if full else 32
    _, optimizer, losses = train(strategy, dataset, steps, width=width)
    print("first losses", losses[:4], "last", losses[-4:])
    print("loss scale", float(optimizer.loss_scale), optimizer.overflow_counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="a layer of width 4096")
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
