"""ParameterServerStrategy on loopback: every fourth batch of a worker overflows.

By turns in the forward pass, and in the gradient of a loss that is large, but finite.

TF_CONFIG=.. python parameter_server.py
"""

import json
import os
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

import keras
import numpy as np
import tensorflow as tf
from support import data
from tensorflow_parameter_server import serve
from tensorflow_parameter_server import train


def dataset():
    x, y = data(512, bad=(100, 356))
    weights = np.ones(len(x), "float32")
    weights[[228, 484]] = 1e30
    batches = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(32)
    return batches.repeat()


def main():
    if json.loads(os.environ["TF_CONFIG"])["task"]["type"] != "chief":
        serve()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    keras.utils.set_random_seed(0)
    model, optimizer, losses = train(strategy, dataset, 200)
    for v in [*model.variables, *optimizer.variables]:
        assert np.isfinite(v.numpy()).all(), v.path
    # Of 200 steps 50 overflow. Workers do not wait for each other: two that write a
    # counter or the scale at once may count, and halve, once.
    assert 20 <= optimizer.overflow_count <= 55, optimizer.overflow_count
    assert 2.0**-14 <= optimizer.loss_scale < 2.0**15
    applied = int(optimizer.iterations.numpy())
    assert 100 <= applied <= 160, applied
    good = [loss for loss in losses if abs(loss) < 1e6]
    forward = sum(not np.isfinite(loss) for loss in losses)
    gradient = len(losses) - len(good) - forward
    assert min(forward, gradient) >= 15, (forward, gradient)
    assert np.mean(good[-20:]) < 0.9 * np.mean(good[:20])
    print("survived", flush=True)


if __name__ == "__main__":
    main()
