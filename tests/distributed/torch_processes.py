"""DistributedDataParallel: several processes on loopback, NCCL on GPUs, else gloo.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python torch_processes.py \\
        survive INNER MICRO_BATCHES
    ... python torch_processes.py loop INNER
    ... python torch_processes.py curves INNER...
    ... python torch_processes.py watched FOLDER EPOCHS
    ... python torch_processes.py dying FOLDER VICTIM
    ... python torch_processes.py collectives
    ... python torch_processes.py monitored FOLDER
"""

import collections
import contextlib
import hashlib
import pathlib
import sys
import time

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch_ddp import Replicated
from torch_ddp import leave
from torch_ddp import start

import faults  # isort: skip
import keras  # isort: skip
import numpy as np  # isort: skip


class Trainer:
    """A model in `fit`, its training passes in DistributedDataParallel.

    Args:
        inner: A key of `faults.INNER`.
        micro_batches: Int, parts of a batch. Defaults to `1`.
        wrap: Whether to use DistributedDataParallel. Defaults to `True`.
        scaled: Whether to scale the loss. Defaults to `True`.
        net: Keyword arguments of `faults.net`.
    """

    def __init__(self, inner, micro_batches=1, wrap=True, scaled=True, **net):
        keras.utils.set_random_seed(0)
        model = faults.net(**net)
        self.processes = dist.get_world_size() if wrap else 1
        self.model = Replicated(model, micro_batches) if wrap else model
        self.optimizer = faults.optimizer(inner, scaled)
        self.model.compile(
            self.optimizer, "sparse_categorical_crossentropy", auto_scale_loss=scaled
        )

    def run(self, x, y, weights, epochs=1, callbacks=()):
        local = faults.BATCH // self.processes
        first = dist.get_rank() if self.processes > 1 else 0
        parts = [
            np.concatenate(np.split(a, len(a) // local)[first :: self.processes])
            for a in (x, y, weights)
        ]
        history = self.model.fit(
            *parts[:2],
            sample_weight=parts[2],
            batch_size=local,
            epochs=epochs,
            callbacks=list(callbacks),
            shuffle=False,
            verbose=0,
        )
        return self.mean(history.history["loss"])

    def mean(self, losses):
        """The mean over the processes, each of which knows its own loss only."""
        losses = torch.tensor(losses, dtype=torch.float64, device=_device())
        if self.processes > 1:
            dist.all_reduce(losses)
        return (losses / self.processes).tolist()

    def state(self):
        """Path -> the copies of a variable; BatchNormalization's are each its own."""
        owned = [*self.model.trainable_variables, *self.optimizer.variables]
        return {f"{i} {v.path}": self.gather(v) for i, v in enumerate(owned)}

    def gather(self, variable):
        # Counters may lie on the host, which NCCL does not see.
        value = variable.value.detach().to(_device()).contiguous()
        copies = [torch.empty_like(value) for _ in range(self.processes)]
        dist.all_gather(copies, value)
        return [c.cpu().numpy() for c in copies]

    def digest(self):
        """A hash of all that should be equal in every process."""
        data = b"".join(c[0].tobytes() for c in self.state().values())
        return hashlib.sha256(data).hexdigest()


class Loop(Trainer):
    """The loop of Keras's guide for distributed torch: a net in the module, no `fit`.

    Its own, so that nothing rolls BatchNormalization back: the net has none.
    """

    def __init__(self, inner):
        keras.utils.set_random_seed(0)
        self.processes = dist.get_world_size()
        self.model = faults.net(batch_normalization=False)
        self.ddp = DistributedDataParallel(self.model)
        self.optimizer = faults.optimizer(inner)
        self.optimizer.build(self.model.trainable_variables)

    def run(self, x, y, weights, epochs=1):
        local = faults.BATCH // self.processes
        own = [
            np.split(a, len(a) // local)[dist.get_rank() :: self.processes]
            for a in (x, y, weights)
        ]
        loss_of = keras.losses.SparseCategoricalCrossentropy()
        variables, losses = self.model.trainable_variables, []
        for batch in zip(*own, strict=True):
            inputs, labels, each = map(torch.as_tensor, batch)
            self.model.zero_grad()
            loss = loss_of(labels, self.ddp(inputs, training=True), each)
            self.optimizer.scale_loss(loss).backward()
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in variables], variables)
            losses.append(float(loss.detach()))
        return self.mean([np.mean(losses)])


def loop(inner):
    trainer = Loop(inner)
    faults.survive(trainer, trainer.optimizer, dist.get_world_size())
    print("digest", trainer.digest(), flush=True)


def survive(inner, micro_batches):
    trainer = Trainer(inner, int(micro_batches))
    size = dist.get_world_size()
    # With four samples to normalize over it learns slowly.
    epochs = 4 if faults.BATCH // (size * int(micro_batches)) > 4 else 6
    faults.survive(trainer, trainer.optimizer, size, epochs)
    variables = trainer.model.non_trainable_variables
    statistics = [keras.ops.convert_to_numpy(v) for v in variables]
    assert all(np.isfinite(s).all() for s in statistics)
    print("digest", trainer.digest(), flush=True)


def watched(folder, epochs):
    faults.watched(Trainer("most"), folder, int(epochs), dist.get_rank() == 0)


def dying(folder, victim):
    """One process dies in its fifth step, after the forward pass."""
    trainer = Trainer("most")
    die = faults.dies_in_fifth_call(dist.get_rank() == int(victim))
    compute_loss = trainer.model.compute_loss

    def compute_loss_or_die(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        die(loss)
        return loss

    trainer.model.compute_loss = compute_loss_or_die
    faults.watched(trainer, folder, 4, dist.get_rank() == 0)


def monitored(folder):
    size = dist.get_rank(), dist.get_world_size()
    faults.monitored(Trainer("plain"), *size, dist.barrier, folder)


def collectives():
    """Scaling the loss adds nothing to what the processes tell each other."""
    found = [_collectives(Trainer("plain", scaled=scaled)) for scaled in (False, True)]
    assert found[0] == found[1] and found[0].total() > 0, found
    print("collectives", dict(found[1]), flush=True)


def _collectives(trainer):
    # After the first batches, by which DistributedDataParallel chooses its buckets.
    trainer.run(*faults.batches(3))
    with torch.profiler.profile() as profile:
        trainer.run(*faults.batches(3, [1]))
    return collections.Counter(
        event.name for event in profile.events() if event.name.startswith("c10d::")
    )


def curves(*inners):
    """The loss of each epoch in one process and in all, from the same seed."""
    for inner in inners:
        alone, together, in_parts = (
            curve(inner, wrap=wrap, micro_batches=parts)
            for wrap, parts in ((False, 1), (True, 1), (True, 2))
        )
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        np.testing.assert_allclose(in_parts, alone, rtol=1e-4)
        assert alone[-1] < 0.9 * alone[0], alone
        print("same curve with", inner, together, flush=True)
    half = [curve("plain", dtype="mixed_float16", wrap=wrap) for wrap in (True, False)]
    faults.check_half_curves(*half)


def curve(inner, dtype="float32", **options):
    trainer = Trainer(inner, dtype=dtype, batch_normalization=False, **options)
    return trainer.run(*faults.batches(8), epochs=4)


def _device():
    """Where collectives take tensors from."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _threads():
    """The names of this process's threads; "" where the system does not tell."""
    found = []
    for name in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # It ended meanwhile.
            found.append(name.read_text().strip())
    return " ".join(found)


if __name__ == "__main__":
    # Well within the deadline, so that NCCL says itself that one is gone.
    start(patience=30)
    globals()[sys.argv[1]](*sys.argv[2:])
    leave()
    # One that has ended may still be listed for a moment.
    for _ in range(100):
        if "gloo" not in _threads():
            break
        time.sleep(0.05)
    assert "gloo" not in _threads(), _threads()
