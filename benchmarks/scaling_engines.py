"""The three engines of `scaling.py` on some devices, with the same few names.

`scope`           a context in which the model is built and trained
`wrap`            the model to train, of a Keras model
`batches`         one batch over and over, for `fit(steps_per_epoch=...)`
`copies`          what each device holds of a variable
`over_processes`  the items of all processes' lists, in order
`own_devices`     a slice: which of the devices that it sees this process trains on
`local_share`     processes that bring their own samples
`chief`           whether this process prints
`leave`           part from the other processes
"""

import contextlib
import os

if os.environ.get("KERAS_BACKEND") == "torch":
    # Imported after TensorFlow in one process, torch may segfault.
    import torch

import keras


class _OneProcess:
    """What an engine does that runs all devices from one process."""

    local_share = 1
    chief = True

    def __init__(self, devices):
        self.own_devices = slice(devices)

    def wrap(self, model):
        return model

    def over_processes(self, items):
        return items

    def leave(self):
        """Nobody to part from."""


class Mirrored(_OneProcess):
    """TensorFlow: one process, `MirroredStrategy`."""

    def __init__(self, devices):
        import tensorflow as tf

        super().__init__(devices)
        self.tf = tf
        gpus = tf.config.list_physical_devices("GPU")
        kind = "GPU" if gpus else "CPU"
        if not gpus:
            cpu = tf.config.list_physical_devices("CPU")[0]
            logical = [tf.config.LogicalDeviceConfiguration()] * devices
            tf.config.set_logical_device_configuration(cpu, logical)
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        _require(devices, gpus or [None] * devices)
        names = [f"{kind}:{i}" for i in range(devices)]
        self.strategy = tf.distribute.MirroredStrategy(names)
        self.scope = self.strategy.scope

    def batches(self, *arrays):
        return self.tf.data.Dataset.from_tensors(arrays).repeat()

    def copies(self, variable):
        return self.strategy.experimental_local_results(variable.value)


class DataParallel(_OneProcess):
    """JAX: one process, `keras.distribution.DataParallel`."""

    scope = contextlib.nullcontext

    def __init__(self, devices):
        super().__init__(devices)
        names = keras.distribution.list_devices()
        _require(devices, names)
        self.distribution = keras.distribution.DataParallel(devices=names[:devices])
        keras.distribution.set_distribution(self.distribution)

    def batches(self, *arrays):
        return _endless(keras.tree.map_structure(self._put, arrays))

    def _put(self, array):
        layout = self.distribution.get_data_layout(array.shape)
        return keras.distribution.distribute_tensor(array, layout)

    def copies(self, variable):
        return [shard.data for shard in variable.value.addressable_shards]


class DDP:
    """torch: a process for each device, `DistributedDataParallel`."""

    def __init__(self, devices):
        from torch_ddp import start

        rank = int(os.environ["RANK"])
        self.device, self.local_share = start(), devices
        self.own_devices = slice(rank, rank + 1)
        self.chief = rank == 0

    def scope(self):
        return keras.device(str(self.device))

    def wrap(self, model):
        from torch_ddp import Replicated

        return Replicated(model)

    def batches(self, *arrays):
        put = keras.ops.convert_to_tensor
        return _endless(keras.tree.map_structure(put, arrays))

    def copies(self, variable):
        # NCCL gathers what lies on this process's own GPU alone.
        value = variable.value.detach().to(self.device).contiguous()
        found = [torch.empty_like(value) for _ in range(self.local_share)]
        torch.distributed.all_gather(found, value)
        return [c.cpu() for c in found]

    def over_processes(self, items):
        found = [None] * self.local_share
        torch.distributed.all_gather_object(found, items)
        return [item for part in found for item in part]

    def leave(self):
        from torch_ddp import leave

        leave()


ENGINES = {"tensorflow": Mirrored, "jax": DataParallel, "torch": DDP}


def _endless(batch):
    while True:
        yield batch


def _require(devices, found):
    if len(found) < devices:
        raise ValueError(
            f"Expected {devices} devices. Received: {len(found)}. Give fewer "
            "`--devices`, or make more visible (`CUDA_VISIBLE_DEVICES`)."
        )
