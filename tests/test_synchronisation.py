"""No transfer from device to host between the ends of epochs: they are counted."""

import contextlib

import keras
import numpy as np
import pytest
from support import classifier
from support import compiled
from support import data
from support import half_classifier

import keras_mixprec as mp
from keras_mixprec.backend import engine

BACKEND = keras.backend.backend()


@contextlib.contextmanager
def tensorflow_transfers(monkeypatch):
    from tensorflow.python.framework import ops

    seen, original = [], ops._EagerTensorBase._numpy
    monkeypatch.setattr(
        ops._EagerTensorBase, "_numpy", lambda self: seen.append(1) or original(self)
    )
    yield seen


@contextlib.contextmanager
def jax_transfers(monkeypatch):
    from jax._src.array import ArrayImpl

    seen, original = [], ArrayImpl._value.fget
    monkeypatch.setattr(
        ArrayImpl, "_value", property(lambda self: seen.append(1) or original(self))
    )
    yield seen


# Until 3.13 Keras reads the two logs of each step on torch; rolled back, again.
VERSION = tuple(map(int, keras.__version__.split(".")[:2]))
READS_LOGS = BACKEND == "torch" and VERSION < (3, 14)


@contextlib.contextmanager
def torch_transfers(monkeypatch):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seen, original = [], torch.Tensor.numpy

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                seen.append(1)
            return function(*args, **(kwargs or {}))

    def numpy(self, *args, **kwargs):
        seen.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    # On a CPU reading is free, and done; take the way that an accelerator takes.
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    with Counting():
        yield seen


transfers = {
    "tensorflow": tensorflow_transfers,
    "jax": jax_transfers,
    "torch": torch_transfers,
}[BACKEND]


def count(model, steps, callbacks, monkeypatch):
    """Transfers of two epochs, once everything is built and compiled."""
    x, y = data(8 * steps, bad=range(8, 16))
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=callbacks, **fit)
    with monkeypatch.context() as patch, transfers(patch) as seen:
        model.fit(x, y, epochs=2, callbacks=callbacks, **fit)
    return len(seen)


@pytest.mark.filterwarnings("ignore:Epoch")
def test_a_step_costs_no_transfer_that_keras_does_not_make(monkeypatch, tmp_path):
    plain, ours = compiled(classifier()), half_classifier()
    without = [count(plain, steps, [], monkeypatch) for steps in (4, 12)]
    monitor = [mp.MixedPrecisionMonitor(verbose=1, json_lines=tmp_path / "log.jsonl")]
    with_ours = [count(ours, steps, monitor, monkeypatch) for steps in (4, 12)]
    # What remains per epoch is the monitor's reading, whatever the number of steps.
    more = 2 * (12 - 4) * 2 if READS_LOGS else 0
    assert with_ours[1] - with_ours[0] == without[1] - without[0] + more
    assert with_ours[0] > without[0]
    assert ours.optimizer.overflow_count == 6


def test_the_counters_see_a_transfer(monkeypatch):
    value = keras.Variable(np.float32(1.0))
    with monkeypatch.context() as patch, transfers(patch) as seen:
        assert float(keras.ops.stop_gradient(value.value)) == 1.0
    assert seen
