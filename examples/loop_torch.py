"""A training loop of one's own on torch, with loss scaling.

    KERAS_BACKEND=torch python examples/loop_torch.py

As with `torch.amp.GradScaler`, but `apply` unscales, checks and skips in one call.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "torch"
import keras  # noqa: E402
import torch  # noqa: F401  Before TensorFlow, or one of them may crash.
from digits import accuracy  # noqa: E402
from digits import batches  # noqa: E402
from digits import build_model  # noqa: E402
from digits import load_data  # noqa: E402

import keras_mixprec as mp  # noqa: E402  # mixed precision


def train(model, optimizer, data):
    """Train for one pass over `data`."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = model.trainable_variables
    for i, (x, y) in enumerate(data):
        model.zero_grad()
        loss = loss_of(keras.ops.convert_to_tensor(y), model(x, training=True))
        scaled = optimizer.scale_loss(loss)  # mixed precision
        scaled.backward()
        with torch.no_grad():
            optimizer.apply([w.value.grad for w in weights], weights)
        if i % 50 == 0:
            print(f"step {i}: loss {float(loss):.3f}")


def main(arguments=None):
    """Train. Returns 0 if 95% of the unseen digits are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="layers of width 4096")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    mp.set_policy(args.policy)  # mixed precision
    x, x_test, y, y_test = load_data()
    model = build_model(4096 if args.full else 64)
    adam = keras.optimizers.Adam(3e-4 if args.full else 3e-3)
    optimizer = mp.LossScaleOptimizer(adam)  # mixed precision
    optimizer.build(model.trainable_variables)
    train(model, optimizer, batches(x, y, 64, epochs=12))
    right = accuracy(model, x_test, y_test)
    print(
        f"{right:.1%} right, loss scale {float(optimizer.loss_scale):,.0f}, "
        f"{optimizer.overflow_count} steps skipped"
    )
    return 0 if right > 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
