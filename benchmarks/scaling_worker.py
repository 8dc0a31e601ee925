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
from rows import peak_memory
from rows import place
from rows import summary

import keras_mixprec as mp
from keras_mixprec import hardware


class Mirrored:
    """TensorFlow: one process, `MirroredStrategy`."""

    local_share = 1

    def __init__(self, devices):
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        kind = "GPU" if gpus else "CPU"
        if not gpus:
            cpu = tf.config.list_physical_devices("CPU")[0]
            logical = [tf.config.LogicalDeviceConfiguration()] * devices
            tf.config.set_logical_device_configuration(cpu, logical)
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        names = [f"{kind}:{i}" for i in range(devices)]
        self.strategy = tf.distribute.MirroredStrategy(names)
        self.scope = self.strategy.scope
        self.chief = True

    def wrap(self, model):
        return model

    def copies(self, variable):
        return self.strategy.experimental_local_results(variable.value)

    def leave(self):
        """Nobody to part from."""


class DataParallel:
    """JAX: one process, `keras.distribution.DataParallel`."""

    local_share = 1

    def __init__(self, devices):
        import contextlib

        names = keras.distribution.list_devices()[:devices]
        distribution = keras.distribution.DataParallel(devices=names)
        keras.distribution.set_distribution(distribution)
        self.scope, self.chief = contextlib.nullcontext, True

    def wrap(self, model):
        return model

    def copies(self, variable):
        return [shard.data for shard in variable.value.addressable_shards]

    def leave(self):
        """Nobody to part from."""


class DDP:
    """torch: a process for each device, `DistributedDataParallel`."""

    def __init__(self, devices):
        from torch_ddp import start

        device, self.local_share = start(), devices
        self.scope = lambda: keras.device(str(device))
        self.chief = os.environ["RANK"] == "0"

    def wrap(self, model):
        from torch_ddp import Replicated

        return Replicated(model)

    def copies(self, variable):
        value = variable.value.detach().contiguous()
        found = [torch.empty_like(value) for _ in range(self.local_share)]
        torch.distributed.all_gather(found, value)
        return [c.cpu() for c in found]

    def leave(self):
        from torch_ddp import leave

        leave()


ENGINES = {"tensorflow": Mirrored, "jax": DataParallel, "torch": DDP}


class Blocks(keras.callbacks.Callback):
    """The seconds of each epoch; the first holds the compilation."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # Keras has read the epoch's loss by now, so that the devices are done.
        self.seconds.append(time.perf_counter() - self.start)


def work(job: dict) -> None:
    """Measure one job and print its row on the chief.

    Args:
        job: Dict of what `scaling.launch` asks for.
    """
    replicas = ENGINES[keras.backend.backend()](job["devices"])
    _measure(replicas, job)
    replicas.leave()


def _measure(replicas, job):
    with replicas.scope():
        model, workload = _compiled(replicas, job)
        blocks = Blocks()
        batches = _batches(workload, job, replicas).repeat(job["steps"])
        epochs = 1 + job["blocks"]
        model.fit(batches, epochs=epochs, verbose=0, callbacks=[blocks])
        checked = _check(replicas, model, workload, job) if job["check"] else None
    if replicas.chief:
        backend = current()
        devices = hardware.gpu_memory()
        row = {"backend": keras.backend.backend(), **job, "overflows_survived": checked}
        batch = job["devices"] * workload.batch
        row |= summary(blocks.seconds[1:], job["steps"], batch)
        row |= peak_memory(devices)
        row["peak_memory_mb_each"] = [round(peak, 1) for _, peak in devices.values()]
        emit(row | place(backend.device(), versions(backend)))


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
        model.compile(optimizer, workload.loss, auto_scale_loss=False)
    return model, workload


def _batches(workload, job, replicas, bad=None):
    """A `tf.data.Dataset` of one batch: of all devices, or of this process."""
    import tensorflow as tf

    # With a device count of 1 in this process each process brings its own device's.
    times = 1 if replicas.local_share > 1 else job["devices"]
    x, y = keras.tree.map_structure(
        lambda a: np.concatenate([a] * times), (workload.x, workload.y)
    )
    weights = np.ones(len(y), "float32")
    if bad is not None:
        own = bad * workload.batch if times > 1 else 0
        if times > 1 or job["devices"] == 1 or int(os.environ["RANK"]) == bad:
            weights[own] = 1e36
    return tf.data.Dataset.from_tensors((x, y, weights))


def _check(replicas, model, workload, job):
    for bad in range(job["devices"]):
        before = model.optimizer.overflow_count
        batches = _batches(workload, job, replicas, bad)
        model.fit(batches, verbose=0)
        owned = [*model.trainable_variables, *model.optimizer.variables]
        if model.optimizer.overflow_count != before + 1:
            return f"no: counted {model.optimizer.overflow_count - before} times"
        for v in owned:
            copies = [np.asarray(c) for c in replicas.copies(v)]
            same = all(c.tobytes() == copies[0].tobytes() for c in copies)
            if not same or not np.isfinite(copies[0]).all():
                return f"no: {v.path} with the overflow on device {bad}"
    return "yes"
