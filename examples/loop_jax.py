"""A training loop of one's own on JAX, with loss scaling.

    KERAS_BACKEND=jax python examples/loop_jax.py

`stateless_scale_loss` reads the scale from the optimizer's variables. A plain
`scale_loss` would be a constant of the trace.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "jax"

import jax  # noqa: E402
import keras  # noqa: E402
from digits import accuracy  # noqa: E402
from digits import batches  # noqa: E402
from digits import build_model  # noqa: E402
from digits import load_data  # noqa: E402

import keras_mixprec as mp  # noqa: E402  # mixed precision


def train(model, optimizer, data):
    """Train for one pass over `data`, and write the state back into the model."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @jax.jit
    def step(state, x, y):
        weights, rest, slots = state

        def scaled_loss(values):
            outputs, new = model.stateless_call(values, rest, x, training=True)
            loss = loss_of(y, outputs)
            scaled = optimizer.stateless_scale_loss(slots, loss)  # mixed precision
            return scaled, (loss, new)

        (_, (loss, rest)), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(
            weights
        )
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return (weights, rest, slots), loss

    owned = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = tuple([v.value for v in variables] for variables in owned)
    for i, (x, y) in enumerate(data):
        state, loss = step(state, x, y)
        if i % 50 == 0:
            print(f"step {i}: loss {float(loss):.3f}")
    for variables, values in zip(owned, state, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


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
