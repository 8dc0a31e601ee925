"""`keras.distribution` on JAX: devices of one process, or of several.

python jax_devices.py survive data|model INNER [PORT PROCESSES INDEX]
python jax_devices.py curves data|model INNER...
"""

import hashlib
import sys

import faults
import jax
import keras
import numpy as np
from jax_processes import start


def distribution(kind):
    """DataParallel over all devices, or four to a model and the rest data-parallel."""
    names = keras.distribution.list_devices()
    if kind == "data":
        return keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    shape = (len(names) // 4, 4)
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), names)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["hidden.*kernel"] = (None, "model")
    layouts["hidden.*bias"] = ("model",)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
    )


class Trainer:
    """A model in `fit` under the distribution that is set.

    Args:
        inner: A key of `faults.INNER`.
        net: Keyword arguments of `faults.net`.
    """

    def __init__(self, inner, **net):
        keras.utils.set_random_seed(0)
        self.model = faults.net(**net)
        self.optimizer = faults.optimizer(inner)
        self.model.compile(self.optimizer, "sparse_categorical_crossentropy")

    def run(self, x, y, weights, epochs=1, callbacks=()):
        processes = jax.process_count()
        first, local = jax.process_index(), faults.BATCH // processes
        # Each process brings its own part of every batch.
        parts = [
            np.concatenate(np.split(a, len(a) // local)[first::processes])
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
        return history.history["loss"]

    def state(self):
        """Variable and part of it -> its copies on the devices of this process."""
        copies = {}
        for i, v in enumerate([*self.model.variables, *self.optimizer.variables]):
            for shard in v.value.addressable_shards:
                key = f"{i} {v.path} {shard.index}"
                copies.setdefault(key, []).append(np.asarray(shard.data))
        return copies

    def check_layouts(self):
        """Slots lie as their weights do; counters lie whole on every device."""
        slots = self.optimizer.inner_optimizer.variables
        for v in [*self.model.variables, *slots]:
            expected = v._layout.backend_layout
            assert v.value.sharding.is_equivalent_to(expected, v.value.ndim), v.path
        for v in self.optimizer._variables:
            assert v.value.sharding.is_fully_replicated, v.path

    def digest(self):
        """A hash of all that should be equal on every process."""
        state = sorted(self.state().items())
        data = b"".join(c[0].tobytes() for _, c in state)
        return hashlib.sha256(data).hexdigest()


def join(port=0, processes=1, index=0):
    where = f"127.0.0.1:{port}"
    # Well within the deadline, so that JAX says itself who did not come.
    start(where, int(processes), int(index), heartbeat=10, patience=100)


def watched(folder, epochs, *cluster):
    join(*cluster)
    keras.distribution.set_distribution(distribution("data"))
    faults.watched(Trainer("most"), folder, int(epochs), jax.process_index() == 0)


def survive(kind, inner, *cluster):
    join(*cluster)
    keras.distribution.set_distribution(distribution(kind))
    trainer = Trainer(inner)
    faults.survive(trainer, trainer.optimizer, min(jax.device_count(), 8))
    trainer.check_layouts()
    print("digest", trainer.digest(), flush=True)


def curves(kind, *inners):
    """The loss of each epoch on one device and on all, from the same seed."""
    for inner in inners:
        alone = curve(inner)
        keras.distribution.set_distribution(distribution(kind))
        together = curve(inner)
        keras.distribution.set_distribution(None)
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        assert alone[-1] < 0.9 * alone[0], alone
        print("same curve with", inner, together, flush=True)


def curve(inner):
    trainer = Trainer(inner, dtype="float32", batch_normalization=False)
    return trainer.run(*faults.batches(8), epochs=4)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
