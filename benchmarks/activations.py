"""Activation functions in float32: what XLA makes of the casts, and the time.

    KERAS_BACKEND=jax python benchmarks/activations.py

Compiles the forward pass of a stack of Dense layers with gelu on JAX, with and
without `activations="float32"`; prints the number of fusions and other operations in
the optimized program, and the median time of both, run in turns.
"""

import collections
import re
import statistics
import time

import jax
import keras
import numpy as np
from keras import layers

import keras_mixprec as mp

WIDTH, DEPTH, BATCH, ROUNDS = 256, 6, 256, 15


def forward(policy, activations):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(WIDTH, activation="gelu") for _ in range(DEPTH)]
    model = keras.Sequential([keras.Input((WIDTH,)), *hidden, layers.Dense(1)])
    mp.convert(model, policy, activations=activations)
    values = [v.value for v in model.variables]

    def call(values, x):
        mapping = list(zip(model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return model(x, training=False)

    x = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype("float32")
    compiled = jax.jit(call).lower(values, x).compile()
    return compiled, values, x


def operations(compiled):
    """Count the operations of the entry computation: what is launched one by one."""
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    names = re.findall(r"= \S+ ([a-z\-]+)\(", entry)
    return collections.Counter(n for n in names if n not in ("parameter", "tuple"))


def milliseconds(compiled, values, x):
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(compiled(values, x))
    return (time.perf_counter() - start) / 5 * 1e3


def main():
    for policy in ("mixed_float16", "mixed_bfloat16"):
        made = {a: forward(policy, a) for a in ("half", "float32")}
        times = {a: [] for a in made}
        for one in made.values():
            milliseconds(*one)
        for _ in range(ROUNDS):
            for a, one in made.items():
                times[a].append(milliseconds(*one))
        for a, (compiled, _, _) in made.items():
            low, high = min(times[a]), max(times[a])
            print(
                f"{policy}, activations in {a}: {statistics.median(times[a]):.2f} ms "
                f"({low:.2f} to {high:.2f}), {dict(operations(compiled))}"
            )


if __name__ == "__main__":
    main()
