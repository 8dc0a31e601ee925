"""Mixed precision under torch's DistributedDataParallel: every process one replica.

    KERAS_BACKEND=torch torchrun --nproc_per_node 2 examples/torch_ddp.py

gloo on CPUs, NCCL on GPUs. DistributedDataParallel averages the gradients in the
backward pass, so that the optimizers of all processes see the same ones, and all apply
or skip a step together. One process, the chief, prints and writes.
"""

import argparse
import datetime
import gc
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")

# Before TensorFlow, which keras may import: the other way round it may crash.
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import keras  # isort: skip
import numpy as np  # isort: skip
from chief import ChiefBackup  # isort: skip

import keras_mixprec as mp  # isort: skip


class Replicated(keras.Model):
    """A Keras model whose training passes go through DistributedDataParallel.

    Args:
        net: `keras.Model`, built.
        micro_batches: Int, parts of a batch that are differentiated one after the
            other; only the last one's backward pass waits for the other processes
            (`no_sync`). Defaults to `1`.
    """

    def __init__(self, net: keras.Model, micro_batches: int = 1):
        super().__init__()
        self.net = net
        self.micro_batches = micro_batches
        # Past Keras, which would wrap a torch module, and track its weights twice.
        ddp = DistributedDataParallel(net)
        self.__dict__["ddp"] = ddp

    def build(self, input_shape):
        """Nothing to build: `net` is."""

    def call(self, inputs, training=False):
        """Return the net's outputs."""
        module = self.__dict__["ddp"] if training else self.net
        return module(inputs, training=training)

    def train_step(self, data):
        """Keras's own step, or several backward passes and one update."""
        if self.micro_batches == 1:
            return super().train_step(data)
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        parts = [
            [None] * self.micro_batches
            if a is None
            else torch.chunk(torch.as_tensor(a), self.micro_batches)
            for a in (x, y, weights)
        ]
        for i, part in enumerate(zip(*parts, strict=True)):
            if i < self.micro_batches - 1:
                with self.__dict__["ddp"].no_sync():
                    self._accumulate(*part)
            else:
                self._accumulate(*part)
        variables = self.trainable_variables
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in variables], variables)
        return self.get_metrics_result()

    def _accumulate(self, x, y, weights):
        prediction = self(x, training=True)
        loss = self.compute_loss(x, y, prediction, weights, training=True)
        self._loss_tracker.update_state(loss, sample_weight=len(x))
        self.compute_metrics(x, y, prediction, weights)
        self.optimizer.scale_loss(loss / self.micro_batches).backward()


def start(patience: float = 600.0) -> torch.device:
    """Join the other processes, as `torchrun` describes them. Returns the device.

    Args:
        patience: Float, seconds that a process waits in NCCL for another before it
            ends with an error: NCCL does not notice that one is gone; gloo does.
            Defaults to torch's own ten minutes.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        timeout = datetime.timedelta(seconds=patience)
        dist.init_process_group("nccl", timeout=timeout)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def leave() -> None:
    """Part from the other processes, once nothing refers to the model any more.

    DistributedDataParallel keeps the process group, and that its threads. One that is
    not through with the last collective when Python ends aborts the process, its work
    done (https://github.com/pytorch/pytorch/issues/190489).
    """
    dist.barrier()  # Nobody leaves while another still waits for it.
    # The module is part of a cycle, so that it does not go by itself.
    gc.collect()
    dist.destroy_process_group()


def train(device: torch.device, epochs: int, backup: str, full: bool = False):
    """Train one replica of a small network on this process's share of the data."""
    keras.utils.set_random_seed(0)
    mp.set_policy("mixed_float16")
    rng = np.random.default_rng(0)
    samples, width, batch = (2**20, 4096, 8192) if full else (512, 32, 64)
    x = rng.normal(size=(samples, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    rank, processes = dist.get_rank(), dist.get_world_size()
    with keras.device(str(device)):
        net = keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(width, activation="relu"),
                keras.layers.Dense(2, activation="softmax", dtype="float32"),
            ]
        )
        model = Replicated(net, micro_batches=2)
        model.compile(mp.LossScaleOptimizer("adam"), "sparse_categorical_crossentropy")
        model.fit(
            x[rank::processes],
            y[rank::processes],
            batch_size=batch // processes,
            epochs=epochs,
            verbose=2 if rank == 0 else 0,
            callbacks=[
                mp.MixedPrecisionMonitor(),
                ChiefBackup(backup, rank == 0),
            ],
        )


def main(**options):
    """Join, train, leave."""
    train(start(), **options)
    leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="a million samples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--backup", default=tempfile.mkdtemp())
    main(**vars(parser.parse_args()))
