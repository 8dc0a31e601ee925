"""Training with faults on one replica at a time, whatever the engine.

Each engine's script brings a `trainer`: `run(x, y, weights, epochs, callbacks)` trains
on batches of `BATCH` in order and returns each epoch's loss; `state()` gives the copies
that the replicas have of each variable.
"""

import faulthandler
import os
import pathlib
import signal
import sys

import keras
import numpy as np
from support import data

import keras_mixprec as mp
from keras_mixprec import hardware

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
from chief import ChiefBackup  # noqa: E402

# Says where it hangs, and ends, even if whoever started it has died.
faulthandler.dump_traceback_later(float(os.environ.get("DEADLINE", 600)), exit=True)

BATCH = 32
GROWTH_STEPS = 4
# Where the net does not overflow by itself, so that every overflow is known.
MAX_SCALE = 2.0**12
INNER = {
    "plain": lambda: keras.optimizers.SGD(0.5, momentum=0.5),
    "accumulation": lambda: keras.optimizers.SGD(
        0.5, momentum=0.5, gradient_accumulation_steps=2
    ),
    "averaging": lambda: keras.optimizers.SGD(
        0.5, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    ),
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.05),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.01),
    "decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    # Not averaging, after which Keras cannot `fit` a second time on JAX: the weights
    # and their averages are then one buffer, which it donates twice.
    "most": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.5, gradient_accumulation_steps=2
    ),
    "all": lambda: keras.optimizers.AdamW(
        0.01,
        weight_decay=0.1,
        global_clipnorm=0.5,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=4,
        gradient_accumulation_steps=2,
    ),
}


def optimizer(inner, wrapped=True):
    """Our wrapper around a fresh `INNER[inner]`, quick to grow; or that alone."""
    if not wrapped:
        return INNER[inner]()
    return mp.LossScaleOptimizer(
        INNER[inner](), MAX_SCALE, GROWTH_STEPS, max_scale=MAX_SCALE
    )


class Embedded(keras.layers.Layer):
    """The inputs, and beside them what an embedding says of the bins they are in."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(8, 4, dtype=self.dtype_policy)

    def build(self, input_shape):
        self.table.build(input_shape)

    def call(self, x):
        bins = keras.ops.cast(keras.ops.clip(x * 2 + 4, 0, 7), "int32")
        return keras.ops.concatenate([x, keras.ops.mean(self.table(bins), 1)], -1)


def net(dtype="mixed_float16", batch_normalization=True, embedding=False):
    """A classifier; without BatchNormalization replicas do what one device does."""
    layers = [
        keras.Input((8,)),
        keras.layers.Dense(16, activation="relu", dtype=dtype, name="hidden"),
        keras.layers.Dense(16, activation="tanh", dtype=dtype, name="hidden_1"),
        keras.layers.Dense(3, activation="softmax", dtype="float32"),
    ]
    if batch_normalization:
        layers.insert(2, keras.layers.BatchNormalization(dtype=dtype))
    if embedding:
        layers.insert(1, Embedded(dtype=dtype))
    return keras.Sequential(layers)


def batches(count, bad_batches=(), bad_sample=0, kind="forward"):
    """Inputs, labels and sample weights in which one sample of a batch overflows.

    In the forward pass an input is too large for float16; in the gradient a weight
    makes the loss large, but finite, and its gradient too large for float16.
    """
    x, y = data(count * BATCH)
    weights = np.ones(len(x), "float32")
    for batch in bad_batches:
        sample = batch * BATCH + bad_sample
        if kind == "forward":
            x[sample] = 1e6
        else:
            weights[sample] = 1e30
    return x, y, weights


class Expected:
    """The rule in plain Python: what the scale and the counter should be."""

    def __init__(self):
        self.scale, self.tracker = MAX_SCALE, 0
        self.overflows, self.consecutive = 0, 0

    def step(self, finite):
        self.tracker = self.tracker + 1 if finite else 0
        self.consecutive = 0 if finite else self.consecutive + 1
        if not finite:
            self.overflows += 1
            self.scale = max(self.scale / 2, 2.0**-14)
        elif self.tracker == GROWTH_STEPS:
            self.scale, self.tracker = min(self.scale * 2, MAX_SCALE), 0


def check(optimizer, expected, replicas):
    """Compare counters, and the variables of all replicas, bit for bit."""
    assert optimizer.overflow_count == expected.overflows, optimizer.overflow_count
    consecutive = optimizer.consecutive_overflows
    assert consecutive == expected.consecutive, consecutive
    assert float(optimizer.loss_scale) == expected.scale, optimizer.loss_scale
    for name, copies in replicas.items():
        assert all(np.isfinite(c).all() for c in copies), name
        assert all(c.tobytes() == copies[0].tobytes() for c in copies), name


def untouched(trainer, optimizer):
    """Path -> bits of all that a skipped step leaves as it is, copies included.

    The optimizer's own variables change: the scale and the counters.
    """
    inner = {v.path for v in optimizer.inner_optimizer.variables}
    own = {v.path for v in optimizer.variables} - inner
    kept = {k: c for k, c in trainer.state().items() if k.split()[1] not in own}
    assert len(kept) > len(trainer.model.trainable_variables), list(kept)
    # BatchNormalization's statistics, of which replicas may have each its own.
    for i, v in enumerate(trainer.model.non_trainable_variables):
        kept[f"statistics {i}"] = [keras.ops.convert_to_numpy(v)]
    return {key: [c.tobytes() for c in copies] for key, copies in kept.items()}


def survive(trainer, optimizer, replicas, epochs=4):
    """Overflow on each replica in turn, then 200 bad steps, then learn."""
    expected = Expected()

    def train(count, bad=(), sample=0, kind="forward"):
        x, y, weights = batches(count, bad, sample, kind)
        (loss,) = trainer.run(x, y, weights)
        for i in range(count):
            expected.step(i not in bad)
        check(optimizer, expected, trainer.state())
        return loss

    def skip(count, sample, kind):
        before = untouched(trainer, optimizer)
        train(count, range(count), sample, kind)
        after = untouched(trainer, optimizer)
        changed = [key for key in before if before[key] != after[key]]
        assert not changed and len(before) == len(after), changed

    for replica in range(replicas):
        for kind in ("forward", "gradient"):
            sample = replica * BATCH // replicas
            train(3, [1], sample, kind)
            skip(1, sample, kind)
    train(1)
    for kind in ("forward", "gradient"):
        skip(100, BATCH - 1, kind)
    assert optimizer.loss_scale == 2.0**-14 and optimizer.consecutive_overflows == 200
    losses = [train(40) for _ in range(epochs)]
    assert losses[-1] < 0.8 * losses[0], losses
    assert optimizer.loss_scale > 2.0**-14
    print("survived", flush=True)


def check_half_curves(together, alone):
    """Compare each epoch's loss in half precision, on one device and on all."""
    # Sums of a share are rounded otherwise than those of a batch; with XLA and without
    # the last epoch's loss on one device differs by 1.3% too.
    np.testing.assert_allclose(together, alone, rtol=0.05)
    assert alone[-1] < 0.9 * alone[0], alone
    print("same in half precision", together, alone, flush=True)


def watched(trainer, folder, epochs, is_chief):
    """Train with a bad batch in each epoch, backing up, and print each epoch's scale.

    The scale halves once an epoch: that of an epoch says how many there were.
    """

    def report(epoch, logs):
        print(f"epoch {epoch} scale {float(trainer.optimizer.loss_scale)}", flush=True)

    callbacks = [
        ChiefBackup(folder, is_chief),
        keras.callbacks.LambdaCallback(on_epoch_end=report),
    ]
    trainer.run(*batches(3, [1]), epochs=epochs, callbacks=callbacks)


def dies_in_fifth_call(is_victim):
    """Return what ends this process at its fifth call, if it is to be ended.

    In `watched` that is the bad batch of the second epoch, with the first backed up.
    """
    calls = []

    def die(loss):
        calls.append(loss)
        if is_victim and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def monitored(trainer, index, processes, wait, folder):
    """Memory is summed over the processes, without their waiting for each other.

    Each has the keys in its logs, in which a global step that overflows counts once.

    Args:
        trainer: As above.
        index: Int, which process this is.
        processes: Int, how many there are.
        wait: Callable that returns once all processes have called it.
        folder: Path; every process asks for a file of its own there.
    """
    # Nobody else is needed, as for a chief that is alone in having the callback.
    own = dict.fromkeys(("host_memory_mb", "gpu_memory_peak_mb"), 2.0**index)
    own["loss"] = 0.5
    first = hardware.memory_over_processes(own)["host_memory_total_mb"]
    assert first >= own["host_memory_mb"], first
    wait()
    total = hardware.memory_over_processes(own)
    assert len(total) == 2 and set(total.values()) == {2.0**processes - 1}, total
    wait()
    path = pathlib.Path(folder) / f"{index}.jsonl"
    monitor = mp.MixedPrecisionMonitor(verbose=1, json_lines=path)
    seen = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.logs.append(dict(logs))
    )
    seen.logs = []
    # A sample of the last process.
    batch = batches(2, [1], BATCH - 1)
    trainer.run(*batch, epochs=2, callbacks=[monitor, seen])
    for epoch, logs in enumerate(seen.logs):
        # In each epoch, or the columns of a log would not fit.
        on_host = "host_memory_mb" in logs
        memory = "host_memory" if on_host else "gpu_memory_peak"
        assert logs[f"{memory}_total_mb"] > logs[f"{memory}_mb"] > on_host, seen.logs
        assert logs["overflow_count"] == 1, seen.logs
        assert logs["overflow_total"] == 1 + epoch, seen.logs
        assert logs["loss_scale"] == MAX_SCALE / 2 ** (1 + epoch), seen.logs
    assert len(seen.logs) == 2, seen.logs
    print("monitored", flush=True)
