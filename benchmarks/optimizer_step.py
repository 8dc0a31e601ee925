"""What loss scaling adds to an optimizer step: a CPU, one minute, no model.

    KERAS_BACKEND=tensorflow python optimizer_step.py

180 variables, 5M parameters, Adam, float32 gradients. The step is timed alone, so that
the cost shows that a whole train step hides. Gradients are what a backward pass leaves:
arrays in memory that nobody else needs. Under XLA they are arguments, for what it would
make of a change of sign it fuses into the update of one optimizer and not into that of
another; without, a change of sign makes them, for TensorFlow writes into their memory,
and into that of a function's arguments it must not. Three optimizers
take turns, block by block: the inner one alone, in Keras's wrapper, in ours; on
TensorFlow with and without XLA. Prints a table and JSON lines. It asserts nothing:
timings depend on what else the machine does.
"""

import argparse
import functools
import statistics
import time

import keras
import numpy as np
from backends import current
from backends import versions
from rows import emit
from rows import place
from rows import summary

import keras_mixprec as mp

OPTIMIZERS = {
    "inner": keras.optimizers.Adam,
    "keras": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    "mp": lambda: mp.LossScaleOptimizer(keras.optimizers.Adam()),
}


class Step:
    """One optimizer with its own variables and given gradients.

    Args:
        kind: A key of `OPTIMIZERS`.
        options: Namespace of the command line.
        mode: A key of what `modes` returns.
        backend: One of `backends`' classes.
    """

    def __init__(self, kind, options, mode, backend):
        self.backend = backend
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=s).astype("float32") for s in _shapes(options)]
        self.variables = [keras.Variable(a) for a in arrays]
        self.grads = [keras.ops.convert_to_tensor(1e-3 * a) for a in arrays]
        self.optimizer = OPTIMIZERS[kind]()
        self.optimizer.build(self.variables)
        # As a model would; the gradients stand for those of the scaled loss.
        self.optimizer.scale_loss(keras.ops.ones(()))
        self.run = modes()[mode](self)

    def block(self, steps):
        """Run some steps. Returns the seconds they took."""
        self.backend.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.run()
        self.backend.wait()
        return time.perf_counter() - start


def _shapes(options):
    """Half matrices, half biases, as in a network of Dense layers."""
    pairs = options.variables // 2
    side = round((options.parameters / pairs) ** 0.5)
    return [shape for _ in range(pairs) for shape in ((side, side), (side,))]


def modes() -> dict:
    """Return mode -> function that makes a callable of a `Step`, for this backend."""
    return {
        "tensorflow": {
            "xla": functools.partial(_tf, jit_compile=True),
            "no xla": functools.partial(_tf, jit_compile=False),
        },
        "jax": {"xla": _jax},
        "torch": {"eager": _torch},
    }[keras.backend.backend()]


def _tf(step, jit_compile):
    import tensorflow as tf

    from keras_mixprec.backend.tensorflow_xla import compiling

    @tf.function(jit_compile=jit_compile)
    def run(grads):
        # A model tells the backend that XLA compiles its step; here nobody else does.
        with compiling(jit_compile):
            grads = grads if jit_compile else [-g for g in grads]
            step.optimizer.apply(grads, step.variables)

    return lambda: run(step.grads)


def _jax(step):
    import jax

    def update(own, grads, trainable):
        return step.optimizer.stateless_apply(own, grads, trainable)

    # As in the JAX trainer: state in and out, the old one donated.
    apply = jax.jit(update, donate_argnums=(0, 2))
    # Copies: what a variable holds must not be donated.
    state = [
        [v.value.copy() for v in variables]
        for variables in (step.optimizer.variables, step.variables)
    ]

    def run():
        trainable, own = apply(state[0], step.grads, state[1])
        state[:] = own, trainable
        step.backend.pending = state

    return run


def _torch(step):
    import torch

    def run():
        with torch.no_grad():
            step.optimizer.apply([-g for g in step.grads], step.variables)

    return run


def measure(mode: str, options: argparse.Namespace, backend) -> list[dict]:
    """Time the three optimizers in turns. Returns their rows."""
    steps = {kind: Step(kind, options, mode, backend) for kind in OPTIMIZERS}
    for step in steps.values():
        step.block(options.warmup)
    blocks = {kind: [] for kind in OPTIMIZERS}
    end = time.perf_counter() + options.seconds
    while len(blocks["mp"]) < 3 or time.perf_counter() < end:
        # Another one begins each round: whoever is first may find a colder cache.
        first = len(blocks["mp"]) % 3
        for kind in [*OPTIMIZERS, *OPTIMIZERS][first : first + 3]:
            blocks[kind].append(steps[kind].block(options.steps))
    inner = blocks["inner"]
    return [
        {"benchmark": "optimizer_step", "backend": keras.backend.backend()}
        | {"mode": mode, "optimizer": kind, "variables": options.variables}
        | {"parameters": sum(int(np.prod(s)) for s in _shapes(options))}
        | summary(seconds, options.steps, 1)
        | {"ratio": round(statistics.median(seconds) / statistics.median(inner), 4)}
        | {"paired_ratio": round(_paired(seconds, inner), 4)}
        | place(backend.device(), versions(backend))
        for kind, seconds in blocks.items()
    ]


def _paired(seconds, reference):
    return statistics.median(s / r for s, r in zip(seconds, reference, strict=True))


def table(rows: list[dict]) -> str:
    """Return the rows as a table for people."""
    lines = [f"{'mode':8}{'optimizer':11}{'ms/step':>9}{'ratio':>8}{'in pairs':>10}"]
    for row in rows:
        lines.append(
            f"{row['mode']:8}{row['optimizer']:11}{row['ms_per_step']:9.3f}"
            f"{row['ratio']:8.3f}{row['paired_ratio']:10.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variables", type=int, default=180)
    parser.add_argument("--parameters", type=int, default=5_000_000)
    parser.add_argument("--warmup", type=int, default=3, help="steps before timing")
    parser.add_argument("--steps", type=int, default=5, help="steps per timed block")
    parser.add_argument("--seconds", type=float, default=12, help="timing, per mode")
    parser.add_argument("--modes", nargs="+", help="'xla', 'no xla'; default: all")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    options = parser.parse_args()
    backend, rows = current(), []
    for mode in options.modes or modes():
        rows += measure(mode, options, backend)
    print(table(rows), flush=True)
    for row in rows:
        emit(row, options.out)


if __name__ == "__main__":
    main()
