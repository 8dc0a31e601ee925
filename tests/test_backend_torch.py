"""torch: what only an accelerator does, done on a CPU."""

import keras
import numpy as np
import pytest
from support import SCALING
from support import assert_same_bits
from support import data
from support import half_classifier
from support import snapshot

if keras.backend.backend() != "torch":
    pytest.skip("torch's own way of restoring", allow_module_level=True)

import torch  # noqa: E402

from keras_mixprec.backend import engine  # noqa: E402

VALUES = [
    torch.tensor([1.5, -0.0, torch.nan, torch.inf]),
    torch.tensor(3.0),
    torch.arange(12.0).reshape(3, 4).T,  # Not contiguous.
    torch.tensor([1.0, torch.nan], dtype=torch.float16),
    torch.tensor([7, -(2**62)], dtype=torch.int64),
    torch.tensor([True, False]),
    torch.tensor([1 - 2j, 3j], dtype=torch.complex128),
    torch.tensor(1 - 2j, dtype=torch.complex128),
]


def bits(variables):
    return [v.value.detach().contiguous().numpy().tobytes() for v in variables]


def spoil(variables):
    for variable in variables:
        with torch.no_grad():
            variable.value.fill_(torch.nan if variable.dtype[:5] == "float" else 1)


@pytest.mark.parametrize("skipped", [True, False])
def test_every_bit_comes_back_where_a_step_was_skipped(skipped):
    variables = [
        keras.Variable(
            v.clone(memory_format=torch.preserve_format),
            dtype=str(v.dtype)[6:],
            trainable=v.is_floating_point(),
        )
        for v in VALUES
    ]
    for _ in range(2):  # The second time with views that were kept.
        before = bits(variables)
        saved = engine.read(variables)
        spoil(variables)
        spoiled = bits(variables)
        engine.restore_by_select(torch.tensor(skipped), variables, saved)
        assert bits(variables) == (before if skipped else spoiled)
        assert before != spoiled or not skipped
        for variable, value in zip(variables, VALUES, strict=True):
            variable.value.data.copy_(value)


def test_a_variable_that_got_other_memory_is_restored_there():
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0])]
    engine.read(variables)  # Its views are kept.
    variables[1]._value = torch.nn.Parameter(torch.tensor([4.0]))
    saved = engine.read(variables)
    spoil(variables)
    engine.restore_by_select(torch.tensor(True), variables, saved)
    assert variables[1].numpy().tolist() == [4.0]


def test_a_skipped_step_leaves_everything_as_it_was_without_a_branch(monkeypatch):
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    model = half_classifier(keras.optimizers.AdamW(0.01))
    x, y = data(64)
    model.train_on_batch(x, y)
    for bad in (np.full_like(x, 1e6), np.full_like(x, np.nan)):
        before = snapshot(model, model.optimizer)
        model.train_on_batch(bad, y)
        after = snapshot(model, model.optimizer)
        assert_same_bits(before, after, but=(*SCALING, "loss/", "accuracy/"))
    assert model.optimizer.overflow_count == 2
    model.train_on_batch(x, y)
    assert int(model.optimizer.iterations) == 2
