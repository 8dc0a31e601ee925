"""Activation functions in float32: what XLA makes of the casts, and the time.

    KERAS_BACKEND=jax python benchmarks/activations.py
    KERAS_BACKEND=tensorflow python benchmarks/activations.py --size small
    KERAS_BACKEND=jax python benchmarks/activations.py --what bert

A stack of Dense layers with gelu, compiled by XLA, with and without
`activations="float32"`. Two rows: the forward pass, and the train step with our loss
scaling; with `--what bert` the train step of BERT-base. The two models take turns,
block by block; the ratio is of the one with float32 functions to the other. At the full
size an activation of the stack has 64 MiB in half precision, so that reading it once
more would show. On JAX the row of the forward pass also has how many operations the
optimized program launches with either.
"""

import argparse
import collections
import functools
import re
import statistics
import time

import keras
import numpy as np
from backends import current
from backends import versions
from keras import layers
from models import build as build_workload
from rows import add_turn
from rows import emit
from rows import place
from rows import wait_for_turn
from shapes import SHAPES

import keras_mixprec as mp

# Width of a layer, how many, and samples in a batch.
SIZES = {"full": (4096, 4, 8192), "small": (256, 6, 256)}
KINDS = ("half", "float32")


def build(policy, activations, size="small"):
    """Return the model, and a batch for it."""
    width, depth, batch = SIZES[size]
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(width, activation="gelu") for _ in range(depth)]
    model = keras.Sequential([keras.Input((width,)), *hidden, layers.Dense(1)])
    mp.convert(model, policy, activations=activations)
    x = np.random.default_rng(0).normal(size=(batch, width)).astype("float32")
    return model, x


def forward(model, x):
    """Return the forward pass as a compiled function of nothing, and its program."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(lambda x: model(x, training=False), jit_compile=True)
        return functools.partial(call, x), None
    import jax

    values = [v.value for v in model.variables]

    def call(values, x):
        mapping = list(zip(model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return model(x, training=False)

    compiled = jax.jit(call).lower(values, x).compile()
    return functools.partial(compiled, values, x), compiled.as_text()


def operations(program):
    """Count the operations of the entry computation: what is launched one by one."""
    entry = program[program.index("ENTRY") :]
    names = re.findall(r"= \S+ ([a-z\-]+)\(", entry)
    return collections.Counter(n for n in names if n not in ("parameter", "tuple"))


class Forward:
    """Blocks of forward passes."""

    name = "forward"
    sizes = SIZES

    def __init__(self, backend, policy, activations, size):
        self.backend = backend
        model, x = build(policy, activations, size)
        self.call, self.program = forward(model, backend.put(x))

    def steps(self, n):
        """Call `n` times, and wait for the device."""
        for _ in range(n):
            result = self.call()
        # The device works in order: with the last one it is done.
        keras.ops.convert_to_numpy(result)


class Train:
    """Blocks of train steps."""

    name = "train step"
    sizes = SIZES
    program = None

    def __init__(self, backend, policy, activations, size):
        self.backend = backend
        self.model, data, loss = self.workload(policy, activations, size)
        optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-5))
        self.model.compile(optimizer, loss, jit_compile=True)
        self.data = backend.put(data)
        self.model._symbolic_build(data_batch=self.data)
        self.model.make_train_function()

    def workload(self, policy, activations, size):
        """Return the model, a batch for it, and its loss."""
        model, x = build(policy, activations, size)
        return model, (x, np.zeros((len(x), 1), "float32")), "mse"

    def steps(self, n):
        """Train for `n` steps, and wait for the device."""
        self.backend.steps(self.model, self.data, n)
        self.backend.wait()


class Bert(Train):
    """Blocks of train steps of BERT-base."""

    name = "train step, BERT-base"
    sizes = {k: (s.width, s.depth, s.batch) for k, s in SHAPES["bert"].items()}

    def workload(self, policy, activations, size):
        """Return the model, a batch for it, and its loss."""
        keras.config.set_dtype_policy(policy)
        found = build_workload("bert", size)
        mp.convert(found.model, policy, activations=activations)
        return found.model, (found.x, found.y), found.loss


WHAT = {"train": Train, "forward": Forward, "bert": Bert}


def compiled(backend, what, policy, size):
    """Return the two runners that are compared, both compiled."""
    runners = {a: what(backend, policy, a, size) for a in KINDS}
    for runner in runners.values():
        runner.steps(3)
    return runners


def measure(backend, runners, policy, options):
    """Return the row of one of the two, under one policy."""
    what = runners[KINDS[0]]
    seconds = {a: [] for a in KINDS}
    for runner in runners.values():
        # Others have used the device since it was compiled.
        runner.steps(3)
    for turn in range(options.blocks):
        # Another one begins each round.
        for a in KINDS if turn % 2 else KINDS[::-1]:
            start = time.perf_counter()
            runners[a].steps(options.steps)
            seconds[a].append(time.perf_counter() - start)
    each = [b / a for a, b in zip(*seconds.values(), strict=True)]
    width, depth, batch = what.sizes[options.size]
    row = {
        "benchmark": "activations",
        "what": what.name,
        "backend": keras.backend.backend(),
        "policy": policy,
        "xla": True,
        "size": options.size,
        "width": width,
        "depth": depth,
        "batch": batch,
    }
    for a in KINDS:
        row[f"ms_{a}"] = round(1000 * statistics.median(seconds[a]) / options.steps, 4)
        if runners[a].program:
            row[f"operations_{a}"] = sum(operations(runners[a].program).values())
    row |= {
        "paired_ratio": round(statistics.median(each), 4),
        "ratio_min": round(min(each), 4),
        "ratio_max": round(max(each), 4),
        "blocks": options.blocks,
        "steps_per_block": options.steps,
    }
    return row | place(backend.device(), versions(backend))


def parse(arguments=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--policy", nargs="+", default=["mixed_float16", "mixed_bfloat16"]
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=["train", "forward"])
    parser.add_argument("--steps", type=int, default=20, help="steps per timed block")
    parser.add_argument("--blocks", type=int, default=15, help="timed blocks")
    add_turn(parser)
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    options = parser.parse_args(arguments)
    if keras.backend.backend() == "torch":
        parser.error("XLA compiles on TensorFlow and JAX. Received: torch.")
    return options


def main():
    """Measure, and print a row each."""
    options, backend = parse(), current()
    pairs = [
        (policy, compiled(backend, what, policy, options.size))
        for policy in options.policy
        for what in map(WHAT.get, options.what)
    ]
    wait_for_turn(options.wait_for_turn)
    for policy, runners in pairs:
        emit(measure(backend, runners, policy, options), options.out)


if __name__ == "__main__":
    main()
