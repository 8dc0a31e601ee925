"""`keras.distribution` on JAX: devices of one process, or of several.

python jax_devices.py survive data|model|across INNER [PORT PROCESSES INDEX]
python jax_devices.py curves data|model INNER...
python jax_devices.py collectives data|model
python jax_devices.py missing data|model
python jax_devices.py inspected data|model
python jax_devices.py watched FOLDER EPOCHS PORT PROCESSES INDEX
python jax_devices.py dying FOLDER 0 PORT PROCESSES INDEX
python jax_devices.py monitored FOLDER PORT PROCESSES INDEX
"""

import collections
import functools
import hashlib
import math
import re
import sys

import faults
import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax_processes import start

import keras_mixprec as mp


def distribution(kind):
    """DataParallel over all devices, or four to a model and the rest data-parallel.

    `model` takes the four from one process if it has them, `across` from all in turn.
    """
    names = keras.distribution.list_devices()
    if kind == "data":
        return keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    if kind == "across":
        names = np.array(names).reshape(jax.process_count(), -1).T.ravel().tolist()
    split = min(len(names), 4)
    shape = (len(names) // split, split)
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), names)
    layouts = keras.distribution.LayoutMap(mesh)
    # A pattern has to match a whole path: where none does, nothing is split.
    layouts[".*hidden.*kernel"] = (None, "model")
    layouts[".*hidden.*bias"] = ("model",)
    layouts[".*row.*kernel"] = ("model", None)
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
        own = _samples_of_this_process()
        parts = [
            a.reshape(-1, faults.BATCH, *a.shape[1:])[:, own].reshape(-1, *a.shape[1:])
            for a in (x, y, weights)
        ]
        history = self.model.fit(
            *parts[:2],
            sample_weight=parts[2],
            batch_size=len(own),
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
        for v in self.model.variables:
            self.check_lies_as(v.value.sharding, v)
            # By its name: `Sequential`'s own has no part in how a weight is split.
            split = isinstance(
                keras.distribution.distribution(), keras.distribution.ModelParallel
            ) and v.path.split("/")[-2].startswith("hidden")
            assert v.value.sharding.is_fully_replicated != split, v.path
        for v in self.optimizer._variables:
            assert v.value.sharding.is_fully_replicated, v.path

    def has_parts_elsewhere(self):
        """Whether other processes hold parts of a weight that this one lacks."""
        return not all(_is_all_here(v.value) for v in self.model.variables)

    def check_lies_as(self, sharding, weight):
        """The slots of a weight are split over the devices as it is."""
        name = weight.path.replace("/", "_") + "_"
        slots = [
            v
            for v in self.optimizer.inner_optimizer.variables
            if v.path.split("/")[-1].startswith(name)
        ]
        assert slots or not weight.trainable, weight.path
        for v in slots:
            assert v.value.sharding.is_equivalent_to(sharding, v.value.ndim), v.path

    def digest(self):
        """A hash of all that should be equal on every process.

        Of a variable that is split over the processes each has a part of its own.
        """
        owned = [*self.model.variables, *self.optimizer.variables]
        parts = {
            f"{i} {shard.index}": np.asarray(shard.data).tobytes()
            for i, v in enumerate(owned)
            if _is_all_here(v.value)
            for shard in v.value.addressable_shards
        }
        data = b"".join(parts[key] for key in sorted(parts))
        return hashlib.sha256(data).hexdigest()


def _samples_of_this_process():
    """Where in a batch stands what the devices of this process take of it."""
    distribution = keras.distribution.distribution()
    places = np.arange(faults.BATCH)
    if distribution is None:
        return places
    layout = distribution.get_data_layout(places.shape).backend_layout
    taken = layout.addressable_devices_indices_map(places.shape).values()
    return np.unique(np.concatenate([places[index] for index in taken]))


def _is_all_here(value):
    here = {str(shard.index) for shard in value.addressable_shards}
    return here == {str(shard.index) for shard in value.global_shards}


def join(port=0, processes=1, index=0):
    where = f"127.0.0.1:{port}"
    # Well within the deadline, so that JAX says itself who did not come.
    start(where, int(processes), int(index), heartbeat=10, patience=100)


def watched(folder, epochs, *cluster):
    join(*cluster)
    keras.distribution.set_distribution(distribution("data"))
    faults.watched(Trainer("most"), folder, int(epochs), jax.process_index() == 0)


def dying(folder, victim, *cluster):
    """The first process dies in its fifth step, after the forward pass.

    Another cannot: the step is one program, and calls back on the first device.
    """
    join(*cluster)
    keras.distribution.set_distribution(distribution("data"))
    trainer = Trainer("most")
    die = faults.dies_in_fifth_call(jax.process_index() == int(victim))
    compute_loss = trainer.model.compute_loss

    def compute_loss_or_die(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        jax.debug.callback(die, loss)
        return loss

    trainer.model.compute_loss = compute_loss_or_die
    faults.watched(trainer, folder, 4, jax.process_index() == 0)


def survive(kind, inner, *cluster):
    join(*cluster)
    keras.distribution.set_distribution(distribution(kind))
    trainer = Trainer(inner)
    faults.survive(trainer, trainer.optimizer, min(jax.device_count(), 8))
    trainer.check_layouts()
    assert kind != "across" or trainer.has_parts_elsewhere()
    print("digest", trainer.digest(), flush=True)


def monitored(folder, *cluster):
    join(*cluster)
    keras.distribution.set_distribution(distribution("data"))
    size = jax.process_index(), jax.process_count()
    wait = functools.partial(multihost_utils.sync_global_devices, "noted")
    faults.monitored(Trainer("plain"), *size, wait, folder)


def curves(kind, *inners):
    """The loss of each epoch on one device and on all, from the same seed."""
    # Curves are compared closer than TF32 computes, which XLA takes on a GPU.
    jax.config.update("jax_default_matmul_precision", "float32")
    for inner in inners:
        alone = curve(inner)
        keras.distribution.set_distribution(distribution(kind))
        together = curve(inner)
        keras.distribution.set_distribution(None)
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        assert alone[-1] < 0.9 * alone[0], alone
        print("same curve with", inner, together, flush=True)
    alone = curve("plain", "mixed_float16")
    keras.distribution.set_distribution(distribution(kind))
    faults.check_half_curves(curve("plain", "mixed_float16"), alone)


def collectives(kind):
    """What the devices tell each other in a step, without loss scaling and with it.

    In data-parallel training the decision is read off the summed gradients. Where
    weights are split, it takes one more all-reduce, of a number for each that is; and
    layers are split as without us, also two of one shape that are split differently.
    """
    keras.distribution.set_distribution(distribution(kind))
    without, ours = (
        _collectives(faults.optimizer("plain", wrapped)) for wrapped in (False, True)
    )
    print("collectives", without, ours, flush=True)
    alone, together = without.pop("all-reduce"), ours.pop("all-reduce")
    assert ours == without
    more = [b - a for a, b in zip(alone, together, strict=True)]
    split = 0 if kind == "data" else 3
    assert more == [bool(split), split], more


def _collectives(optimizer):
    """Return operation -> (how many, of how many numbers) in a compiled step."""
    dense = keras.layers.Dense
    model = keras.Sequential(
        [
            keras.Input((8,)),
            dense(16, dtype="mixed_float16", name="first"),
            dense(16, dtype="mixed_float16", name="hidden"),
            dense(16, dtype="mixed_float16", name="row"),
            dense(3, activation="softmax", dtype="float32"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", auto_scale_loss=False)
    batch = [jnp.asarray(a) for a in faults.batches(1)]
    model.fit(*batch[:2], sample_weight=batch[2], batch_size=faults.BATCH, verbose=0)
    owners = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in owned] for owned in owners)
    shardings = jax.tree.map(lambda value: value.sharding, state)
    step = jax.jit(model.train_step, out_shardings=(None, shardings))
    layout = keras.distribution.distribution().get_data_layout
    batch = [jax.device_put(a, layout(a.shape).backend_layout) for a in batch]
    return _count(step.lower(state, tuple(batch)).compile().as_text())


def missing(kind):
    """A variable without a gradient stays; the others are stepped, or skipped whole."""
    keras.distribution.set_distribution(distribution(kind))
    for apply in (_apply, _stateless_apply):
        model = faults.net()
        variables = model.trainable_variables
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), 8.0)
        optimizer.build(variables)
        grads = [
            jax.device_put(jnp.full(v.shape, 8.0), v.value.sharding) for v in variables
        ]
        # Of a weight that is split, before one that overflows: counts go by position.
        grads[0] = None
        before = [np.asarray(v.value) for v in variables]
        apply(optimizer, grads, variables)
        after = [before[0], *(value - 0.5 for value in before[1:])]
        _check_values(variables, after)
        hidden = next(i for i, v in enumerate(variables) if "hidden_1/k" in v.path)
        # On one device alone.
        grads[hidden] = grads[hidden].at[0, -1].set(jnp.inf)
        apply(optimizer, grads, variables)
        _check_values(variables, after)
        expected = {v.path: int(i == hidden) for i, v in enumerate(variables)}
        assert optimizer.overflow_counts == expected, optimizer.overflow_counts
        assert optimizer.loss_scale == 4.0, optimizer.loss_scale
        print("stepped and skipped by", apply.__name__, flush=True)


def _apply(optimizer, grads, variables):
    optimizer.scale_loss(0.0)
    optimizer.apply(grads, variables)


def _stateless_apply(optimizer, grads, variables):
    optimizer.scale_loss(0.0)
    owned = variables, optimizer.variables
    values = [[v.value for v in kept] for kept in owned]
    step = jax.jit(
        lambda own, grads, state: optimizer.stateless_apply(state, grads, own)
    )
    found = step(values[0], grads, values[1])
    for kept, new in zip(owned, found, strict=True):
        for variable, value in zip(kept, new, strict=True):
            variable.assign(value)


def _check_values(variables, expected):
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(variable.value, value, err_msg=variable.path)


def inspected(kind):
    """Steps in mid-epoch can be looked at; what looks at them is compiled once."""
    keras.distribution.set_distribution(distribution(kind))
    compiled, seen = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append("backend_compile" in event)
    )
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(sum(compiled))
    )
    inspector = mp.OverflowInspector(batches=range(2, 5))
    Trainer("plain").run(*faults.batches(6), epochs=2, callbacks=[watch, inspector])
    frames = [(f.epoch, f.batch) for f in inspector.report.frames]
    assert frames == [(e, b) for e in (0, 1) for b in (2, 3, 4)], frames
    # The second batch runs what the first compiled; the third is the first looked at.
    first, second = seen[:6], seen[6:]
    assert first[0] < first[1] == first[2] < first[3] == first[5], seen
    assert second[0] == second[5], seen
    print("compiled once", seen, flush=True)


def _count(program):
    found = collections.defaultdict(lambda: np.zeros(2, int))
    # On a GPU an operation may start in one line and be done in another; the type in
    # the first holds what goes in as well.
    pattern = r" = (.*?) (all-\w+|reduce-scatter)(?:-done)?\("
    for type_, name in re.findall(pattern, program):
        shapes = re.findall(r"\[([\d,]*)\]", type_)
        numbers = sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
        found[name] += 1, numbers
    return {name: tuple(map(int, counts)) for name, counts in found.items()}


def curve(inner, dtype="float32"):
    trainer = Trainer(inner, dtype=dtype, batch_normalization=False)
    return trainer.run(*faults.batches(8), epochs=4)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
