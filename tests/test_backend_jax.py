"""JAX: what only a GPU does, done on a CPU."""

import keras
import numpy as np
import pytest
from support import assert_skipped_whole
from support import data
from support import half_classifier

if keras.backend.backend() != "jax":
    pytest.skip("JAX's own way to keep an update", allow_module_level=True)

import jax  # noqa: E402

from keras_mixprec.backend import engine  # noqa: E402


@pytest.mark.parametrize("fuses, barriers", [(False, 0), (True, 1)])
def test_many_small_variables_are_selected_by_an_array(fuses, barriers, monkeypatch):
    # XLA makes one kernel of those that read the same array. Of a CPU's it does not.
    monkeypatch.setattr(engine, "_fuses", lambda: fuses)
    variables = [keras.Variable(np.full((4,), i, "float32")) for i in range(8)]
    variables += [keras.Variable(np.ones((5,), "float32"))]
    old = [v.value for v in variables]

    def step(skipped):
        new = [2 * value for value in old[:-1]] + [old[-1]]
        return engine._chosen(skipped, variables, old, new)

    equations = jax.make_jaxpr(step)(True).eqns
    found = [e for e in equations if e.primitive.name == "optimization_barrier"]
    assert len(found) == barriers
    # What is not new is not selected.
    selects = [e for e in equations if "_where" in str(e.params.get("name"))]
    assert len(selects) == 8
    shared = [e.outvars[0] for e in found]
    assert all(e.invars[0] in shared for e in selects) == fuses
    for skipped, factor in ((True, 1), (False, 2)):
        chosen = jax.jit(step)(skipped)
        assert [float(x[0]) for x in chosen] == [factor * i for i in range(8)] + [1]


def test_what_a_gpu_runs_skips_a_step_whole_and_learns_the_same(monkeypatch):
    x, y = data(64)
    weights, by_block = [], []
    look = engine.flags_by_block

    def counting(grads, scale):
        by_block.append(len(grads))
        return look(grads, scale)

    monkeypatch.setattr(engine, "flags_by_block", counting)
    for fuses in (False, True):
        monkeypatch.setattr(engine, "_fuses", lambda fuses=fuses: fuses)
        keras.utils.set_random_seed(0)
        model = half_classifier("adam", 0.0)
        model.train_on_batch(x, y)
        assert_skipped_whole(model, np.full_like(x, np.nan), y)
        model.train_on_batch(x, y)
        assert model.optimizer.overflow_count == 1
        weights.append([np.asarray(v.value) for v in model.weights])
        assert bool(by_block) == fuses
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_a_gpu_that_has_whole_weights_shares_decisions(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert engine._fuses()
    split = keras.distribution.ModelParallel(
        layout_map=keras.distribution.LayoutMap(
            keras.distribution.DeviceMesh((1,), ["model"], devices=["cpu:0"])
        )
    )
    with split.scope():
        assert not engine._fuses()
    monkeypatch.undo()
    assert engine._fuses() == (jax.default_backend() == "gpu")
