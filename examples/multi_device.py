"""Train on several devices of one machine, in mixed precision.

    python examples/multi_device.py
    KERAS_BACKEND=jax python examples/multi_device.py --devices 4
    python examples/multi_device.py --full          # all GPUs, wider layers

MirroredStrategy on TensorFlow, DataParallel on JAX; torch has a process for each
device: see `torch_ddp.py`. Without GPUs the CPU is split into logical devices. An image
that overflows float16 is put into one batch of each epoch, on one device: that step is
skipped on all of them, and counted once.
"""

import argparse
import contextlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--devices", type=int, default=2, help="if there are no GPUs")
    parser.add_argument("--full", action="store_true", help="layers of width 4096")
    return parser.parse_args(arguments)


if os.environ.get("KERAS_BACKEND") == "jax":
    # Before JAX starts, which counts its devices then.
    flag = f"--xla_force_host_platform_device_count={parse().devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import keras  # noqa: E402
from digits import accuracy  # noqa: E402
from digits import build_model  # noqa: E402
from digits import load_data  # noqa: E402

import keras_mixprec as mp  # noqa: E402  # mixed precision

BATCH = 64


def mirrored(devices):
    """Return a scope in which TensorFlow keeps a copy of each variable per device."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.distribute.MirroredStrategy().scope()
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration()] * devices
    tf.config.set_logical_device_configuration(cpu, logical)
    names = [f"CPU:{i}" for i in range(devices)]
    return tf.distribute.MirroredStrategy(names).scope()


def data_parallel(devices):
    """Spread every batch over JAX's devices."""
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    return contextlib.nullcontext()


ENGINES = {"tensorflow": mirrored, "jax": data_parallel}


def main(arguments=None):
    """Train. Returns 0 if each epoch skips one step and 90% are right, 1 otherwise."""
    args = parse(arguments)
    engine = ENGINES.get(keras.backend.backend())
    if engine is None:
        sys.exit("On torch every device has a process of its own: see torch_ddp.py.")
    keras.utils.set_random_seed(0)
    mp.set_policy(args.policy)  # mixed precision
    x, x_test, y, y_test = load_data()
    whole = len(x) // BATCH * BATCH
    x, y = x[:whole], y[:whole]
    with engine(args.devices):
        model = build_model(4096 if args.full else 64)
        model.compile(
            keras.optimizers.Adam(3e-4 if args.full else 3e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    half = args.policy == "mixed_float16"
    if half:
        x[BATCH] = 1e6
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=12,
        verbose=2,
        callbacks=[mp.MixedPrecisionMonitor()],  # mixed precision
    ).history
    right = accuracy(model, x_test, y_test)
    print(f"{right:.1%} right on unseen images")
    once_an_epoch = not half or set(history["overflow_count"]) == {1}
    return 0 if right > 0.9 and once_an_epoch else 1


if __name__ == "__main__":
    sys.exit(main())
