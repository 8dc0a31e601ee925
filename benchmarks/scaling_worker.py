"""One measurement of `scaling.py`: the engine, the model, the clock, the faults."""

import os
import time

if os.environ.get("KERAS_BACKEND") == "torch":
    # Imported after TensorFlow in one process, torch may segfault.
    import torch  # noqa: F401

import keras
import models
import numpy as np
from backends import current
from backends import versions
from rows import emit
from rows import host_peak
from rows import place
from rows import summary
from rows import wait_for_turn
from scaling_engines import ENGINES

import keras_mixprec as mp
from keras_mixprec import hardware

# Epochs that are not timed: one that compiles, and one after the others' turns.
_WARM_UP = 2


class Blocks(keras.callbacks.Callback):
    """The seconds of each epoch; after the first it waits for its turn.

    Args:
        wait: Whether there are turns.
    """

    def __init__(self, wait):
        super().__init__()
        self.wait, self.seconds = wait, []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # Keras has read the epoch's loss by now, so that the devices are done.
        self.seconds.append(time.perf_counter() - self.start)
        if epoch == 0:
            # In every process: in a collective, a GPU would wait by working.
            wait_for_turn(self.wait)


def work(job: dict) -> None:
    """Measure one job and print its row on the chief.

    Args:
        job: Dict of what `scaling.launch` asks for.
    """
    replicas = ENGINES[keras.backend.backend()](job["devices"])
    row = _measure(replicas, job)
    if replicas.chief:
        emit(row)
    replicas.leave()


def _measure(replicas, job):
    with replicas.scope():
        model, workload = _compiled(replicas, job)
        blocks = Blocks(job["wait_for_turn"])
        batches = replicas.batches(*_batch(workload, job, replicas))
        epochs = _WARM_UP + job["blocks"]
        steps = job["steps"]
        model.fit(
            batches, epochs=epochs, steps_per_epoch=steps, verbose=0, callbacks=[blocks]
        )
        memory = _memory(replicas)
        parted = _parted(replicas, model) if job["check"] else None
        checks = job["check"] and job["scaling"] == "mp"
        checked = _check(replicas, model, workload, job) if checks else None
    backend = current()
    return {
        **_described(job, workload),
        **summary(blocks.seconds[_WARM_UP:], steps, job["devices"] * workload.batch),
        **memory,
        "copies_parted": parted,
        "overflows_survived": checked,
        **place(backend.device(), versions(backend)),
    }


def _described(job, workload):
    return {
        "benchmark": "scaling",
        "model": job["model"],
        "size": job["size"],
        "backend": keras.backend.backend(),
        "scaling": job["scaling"],
        "policy": "mixed_float16",
        "xla": keras.backend.backend() == "jax",
        "batch": workload.batch,
        "devices": job["devices"],
        "deterministic": _is_deterministic(),
        "together": job["wait_for_turn"],
    }


def _is_deterministic():
    tensorflow = keras.backend.backend() == "tensorflow"
    return tensorflow and os.environ.get("TF_DETERMINISTIC_OPS") in ("1", "true")


def _memory(replicas):
    found = [peak for _, peak in hardware.gpu_memory().values()]
    own = found[replicas.own_devices] or [host_peak()]
    each = [round(peak, 1) for peak in replicas.over_processes(own)]
    return {
        "peak_memory_mb": round(sum(each), 1),
        "memory_of": "device" if found else "host",
        "peak_memory_mb_each": each,
    }


def _compiled(replicas, job):
    scaled = job["scaling"] != "none"
    with mp.policy_scope("mixed_float16"):
        workload = models.build(job["model"], job["size"], job["batch"])
        model = replicas.wrap(workload.model)
        optimizer = keras.optimizers.Adam(1e-4)
        wrappers = {"keras": keras.optimizers, "mp": mp}
        if scaled:
            module = wrappers[job["scaling"]]
            optimizer = module.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
        model.compile(
            optimizer,
            workload.loss,
            auto_scale_loss=False,
            jit_compile=keras.backend.backend() == "jax",
        )
    return model, workload


def _batch(workload, job, replicas, bad=None):
    """x, y and weights of all devices, or of this process's own alone."""
    # Where each process has one device, it brings that one's samples.
    times = 1 if replicas.local_share > 1 else job["devices"]
    x, y = keras.tree.map_structure(
        lambda a: np.concatenate([a] * times), (workload.x, workload.y)
    )
    weights = np.ones(len(y), "float32")
    if bad is not None:
        own = bad * workload.batch if times > 1 else 0
        if times > 1 or job["devices"] == 1 or int(os.environ["RANK"]) == bad:
            weights[own] = 1e36
    return x, y, weights


def _check(replicas, model, workload, job):
    """Say `yes`, or what an overflow on which device has done.

    A step that is skipped leaves each device's copies of the weights and of the inner
    optimizer's state as they were, and what counts it the same on all.
    """
    optimizer = model.optimizer
    kept = [*model.trainable_variables, *optimizer.inner_optimizer.variables]
    own = [v for v in optimizer.variables if all(v is not k for k in kept)]
    found = []
    for bad in range(job["devices"]):
        counted = optimizer.overflow_count
        before = [_copies(replicas, v) for v in kept]
        batches = replicas.batches(*_batch(workload, job, replicas, bad))
        model.fit(batches, steps_per_epoch=1, verbose=0)
        counted = optimizer.overflow_count - counted
        if counted != 1:
            found.append(f"no: counted {counted} times with one on device {bad}")
        # All look at all variables, whatever they find: others wait for them in it.
        wrong = [
            (v.path, _changed(copies, _copies(replicas, v)))
            for v, copies in zip(kept, before, strict=True)
        ]
        wrong += [(v.path, _apart(_copies(replicas, v))) for v in own]
        found += [
            f"no: {path} {what} with the overflow on device {bad}"
            for path, what in wrong
            if what
        ]
    # An engine's processes may see different things; one that fails speaks for all.
    return (replicas.over_processes(found) or ["yes"])[0]


def _parted(replicas, model):
    """Say which weight's copies differ most between the devices; empty if none do."""
    found = [
        (v.path, _difference(_copies(replicas, v))) for v in model.trainable_variables
    ]
    path, most = max(found, key=lambda pair: pair[1])
    return f"{path} by {most:.2g}" if most else ""


def _copies(replicas, variable):
    return [np.asarray(copy) for copy in replicas.copies(variable)]


def _changed(before, after):
    """Return what has become of a variable's copies; empty if they are as before."""
    if not all(np.isfinite(copy).all() for copy in after):
        return "is not finite"
    same = [a.tobytes() == b.tobytes() for a, b in zip(after, before, strict=True)]
    return "" if all(same) else f"changed on device {same.index(False)}"


def _apart(copies):
    """Return what is wrong with the devices' copies of a variable; empty if nothing."""
    if not all(np.isfinite(copy).all() for copy in copies):
        return "is not finite"
    difference = _difference(copies)
    return f"differs by {difference:.2g}" if difference else ""


def _difference(copies):
    """Return the largest difference to the first copy; 0.0 only if the bits are one.

    Of bits that differ without a difference in value, as NaNs do, infinity.
    """
    first, *others = copies
    if all(copy.tobytes() == first.tobytes() for copy in others):
        return 0.0
    first = first.astype("float64")
    most = max(np.abs(copy - first).max() for copy in others)
    return most if most > 0 else np.inf
