"""Time the train step of one model: one row in one process, or several interleaved.

    KERAS_BACKEND=tensorflow python train_step.py --model bert --scaling mp --xla
    KERAS_BACKEND=jax python train_step.py --model bert --scaling none,keras,mp

The step is the model's own train function, called as `fit` calls it, on one batch
that stays on the device. Nothing is read from the device inside a timed block, except
by the monitor at its end.

| `--scaling` | what is compiled |
|-|-|
| `none` | the policy with `auto_scale_loss=False`, nothing of ours |
| `keras` | `keras.optimizers.LossScaleOptimizer`, nothing of ours |
| `unscaled` | the same as `none` with this package imported, which is all it takes |
| `fixed` | that with Adam on gradients of 2**15 times the loss: never checked |
| `mp` | `keras_mixprec.set_policy`, then `compile("adam")`: wrapper and transaction |
| `mp+monitor` | the same with `MixedPrecisionMonitor`, each block being an epoch |

With `--activations float32` the model is converted to activation functions in float32.

What `none` and `mp` differ by is what a user of Keras gains or loses; `unscaled` and
`mp`, what scaling costs; `fixed` and `mp`, what checking and skipping do. Without
scaling many float16 gradients of a deep model are 0, and a GPU is faster on zeros
(`NOTES.md`).

With several scalings, separated by commas, the models live in one process and take
turns, block by block, so that a drifting clock or a busy machine hits all alike; each
row then has `ratio`, its median over that of the first, and `paired_ratio`, the median
over the rounds of the ratio within a round; `ratio_to_fixed` and
`paired_ratio_to_fixed` likewise where `fixed` is one of them. Memory is only measured
in rows that have a process for themselves. With `--wait-for-turn` the row says
`together`: `compile_s` was then taken beside others that compiled.
"""

import argparse
import contextlib
import statistics
import time

import keras
from backends import current
from backends import versions
from models import build
from rows import add_turn
from rows import emit
from rows import peak_memory
from rows import place
from rows import summary
from rows import wait_for_turn
from shapes import SHAPES
from shapes import SIZES

import keras_mixprec as mp
from keras_mixprec import compile_hook
from keras_mixprec import hardware
from keras_mixprec.backend import engine

SCALINGS = ("none", "keras", "unscaled", "fixed", "mp", "mp+monitor")
POLICIES = ("float32", "tf32", "mixed_float16", "mixed_bfloat16")


class FixedScale(keras.optimizers.Adam):
    """Adam with a fixed loss scale. Keras's own `loss_scale_factor` is for dense grads.

    A model that overflows at this scale is lost: a baseline, no optimizer.
    """

    def scale_loss(self, loss):
        """Return the loss times 2**15."""
        return loss * 2.0**15

    def apply(self, grads, trainable_variables=None):
        """Update the variables with the gradients over 2**15."""
        scale = keras.ops.convert_to_tensor(2.0**15)
        super().apply(engine.unscale(grads, scale), trainable_variables)


class Runner:
    """One compiled model with its data on the device.

    Args:
        backend: One of `backends`' classes.
        scaling: One of `SCALINGS`.
        options: Namespace of the command line.
    """

    def __init__(self, backend, scaling, options):
        self.backend = backend
        self.scaling = scaling
        policy = "float32" if options.policy == "tf32" else options.policy
        keras.config.set_dtype_policy(policy)
        workload = build(options.model, options.size, options.batch)
        self.model, self.batch = workload.model, workload.batch
        if options.activations != "half":
            mp.convert(self.model, policy, activations=options.activations)
        _compile(workload, scaling, policy, options.xla)
        self.data = backend.put((workload.x, workload.y))
        monitor = [mp.MixedPrecisionMonitor()] if scaling == "mp+monitor" else []
        self.callbacks = keras.callbacks.CallbackList(monitor, model=self.model)
        self.model._symbolic_build(data_batch=self.data)
        self.model.make_train_function()
        self.callbacks.on_train_begin()

    def block(self, steps):
        """Run one epoch of some steps. Returns its seconds."""
        self.backend.wait()
        start = time.perf_counter()
        self.callbacks.on_epoch_begin(0)
        for batch in range(2):
            # The monitor begins to judge the epoch at its second.
            self.callbacks.on_train_batch_begin(batch)
        self.backend.steps(self.model, self.data, steps)
        # Without it, the epoch's end would be charged for the steps' own time.
        self.backend.wait()
        self.callbacks.on_epoch_end(0, {})
        return time.perf_counter() - start


def _compile(workload, scaling, policy, xla):
    model, loss = workload.model, workload.loss
    adam = keras.optimizers.Adam(1e-4)
    if scaling in ("none", "keras"):
        if scaling == "keras":
            adam = keras.optimizers.LossScaleOptimizer(adam)
        with _nothing_of_ours():
            model.compile(adam, loss, jit_compile=xla, auto_scale_loss=False)
    elif scaling in ("unscaled", "fixed"):
        optimizer = FixedScale(1e-4) if scaling == "fixed" else adam
        model.compile(optimizer, loss, jit_compile=xla, auto_scale_loss=False)
    else:
        # The scope takes the hook away again: other rows must not see it.
        with mp.policy_scope(policy):
            model.compile(adam, loss, jit_compile=xla)


@contextlib.contextmanager
def _nothing_of_ours():
    put_back = compile_hook.install if compile_hook.is_installed() else compile_hook.put
    compile_hook.remove()
    try:
        yield
    finally:
        put_back()


def measure(options: argparse.Namespace) -> list[dict]:
    """Build, warm up and time every scaling asked for. Returns their rows."""
    backend = current()
    if options.policy in ("float32", "tf32"):
        backend.set_tf32(options.policy == "tf32")
    runners, rows = [], []
    for scaling in options.scaling:
        runner, seconds = _start(backend, scaling, options)
        runners.append(runner)
        rows.append(_described(runner, options) | {"compile_s": round(seconds, 2)})
    if options.wait_for_turn:
        wait_for_turn()
        for runner in runners:
            # Others have used the device since.
            runner.block(options.warmup)
    blocks = _interleaved(runners, options)
    for row, seconds in zip(rows, blocks, strict=True):
        row |= summary(seconds, options.steps, row["batch"])
        row |= _ratios(seconds, blocks[0]) if len(rows) > 1 else {}
        if "fixed" in options.scaling[1:]:
            fixed = blocks[options.scaling.index("fixed")]
            row |= {f"{k}_to_fixed": v for k, v in _ratios(seconds, fixed).items()}
    if len(rows) == 1:
        rows[0] |= peak_memory(hardware.gpu_memory())
    return [row | place(backend.device(), versions(backend)) for row in rows]


def _start(backend, scaling, options):
    runner = Runner(backend, scaling, options)
    # The first step traces and compiles; what it computes is lost in that.
    seconds = runner.block(1)
    runner.block(options.warmup)
    return runner, seconds


def _interleaved(runners, options):
    blocks = [[] for _ in runners]
    for turn in range(options.blocks):
        # Another one begins each round: whoever is first may find a colder device.
        for i in range(len(runners)):
            k = (i + turn) % len(runners)
            blocks[k].append(runners[k].block(options.steps))
    return blocks


def _ratios(seconds, reference):
    paired = [s / r for s, r in zip(seconds, reference, strict=True)]
    ratio = statistics.median(seconds) / statistics.median(reference)
    return {
        "ratio": round(ratio, 4),
        "paired_ratio": round(statistics.median(paired), 4),
    }


def _described(runner, options):
    # Named where it is not the default, as rows without it were before.
    converted = options.activations != "half"
    activations = {"activations": options.activations} if converted else {}
    return activations | {
        "benchmark": "train_step",
        "model": options.model,
        "size": options.size,
        "backend": keras.backend.backend(),
        "scaling": runner.scaling,
        "policy": options.policy,
        "xla": options.xla,
        "batch": runner.batch,
        "together": options.wait_for_turn,
        "interleaved": options.scaling if len(options.scaling) > 1 else None,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    backend = keras.backend.backend()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(SHAPES), default="mlp")
    parser.add_argument("--scaling", type=_scalings, default=["mp"])
    parser.add_argument("--policy", choices=POLICIES, default="mixed_float16")
    parser.add_argument(
        "--activations", choices=("half", "float32"), default="half", help="computed in"
    )
    # For torch this is `torch.compile`.
    parser.add_argument(
        "--xla", action=argparse.BooleanOptionalAction, default=backend != "torch"
    )
    parser.add_argument("--monitor", action="store_true", help="mp as mp+monitor")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, help="samples per step")
    parser.add_argument("--warmup", type=int, default=3, help="steps before timing")
    parser.add_argument("--steps", type=int, default=10, help="steps per timed block")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks")
    add_turn(parser)
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    options = parser.parse_args(arguments)
    if backend == "jax" and not options.xla:
        parser.error("JAX always compiles. Received: --no-xla. Leave it out.")
    if options.monitor:
        options.scaling = [_watched(s) for s in options.scaling]
    return options


def _scalings(text):
    names = text.split(",")
    unknown = sorted(set(names) - set(SCALINGS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected names from {', '.join(SCALINGS)}. Received: {unknown}. "
            "Separate several by commas."
        )
    return names


def _watched(scaling):
    return "mp+monitor" if scaling == "mp" else scaling


if __name__ == "__main__":
    chosen = parse()
    for measured in measure(chosen):
        emit(measured, chosen.out)
