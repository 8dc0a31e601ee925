"""Mixed precision in several JAX processes: keras.distribution and jax.distributed.

    KERAS_BACKEND=jax python examples/jax_processes.py \\
        --coordinator host0:1234 --processes 2 --index 0

One step is one program over the devices of all processes, so that there is one gradient
and one decision. Without `--processes` it runs on the devices of this machine.
"""

import argparse
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
from chief import ChiefBackup

import keras_mixprec as mp


def start(
    coordinator: str,
    processes: int,
    index: int,
    heartbeat: int = 100,
    patience: int = 300,
):
    """Join the other processes, before anything else asks JAX for devices.

    Args:
        coordinator: String, `host:port` of the first process.
        processes: Int.
        index: Int, which of them this one is.
        heartbeat: Int, seconds of silence after which a process counts as dead.
            Defaults to `100`.
        patience: Int, seconds to wait for the others to join. Defaults to `300`.
    """
    if processes > 1:
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
        )


def set_data_parallel():
    """Spread every batch over all devices; each process brings its own part."""
    distribution = keras.distribution.DataParallel(
        devices=keras.distribution.list_devices(), auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)


def main(coordinator, processes, index, epochs, backup, full=False):
    start(coordinator, processes, index)
    # The same weights everywhere.
    keras.utils.set_random_seed(0)
    set_data_parallel()
    mp.set_policy("mixed_float16")
    rng = np.random.default_rng(0)
    samples, width, batch = (2**20, 4096, 8192) if full else (512, 32, 64)
    x = rng.normal(size=(samples, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(2, activation="softmax", dtype="float32"),
        ]
    )
    model.compile(mp.LossScaleOptimizer("adam"), "sparse_categorical_crossentropy")
    model.fit(
        x[index::processes],
        y[index::processes],
        batch_size=batch // processes,
        epochs=epochs,
        verbose=2 if index == 0 else 0,
        callbacks=[mp.MixedPrecisionMonitor(), ChiefBackup(backup, index == 0)],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", default="127.0.0.1:1234")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="a million samples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--backup", default=tempfile.mkdtemp())
    main(**vars(parser.parse_args()))
