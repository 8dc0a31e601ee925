"""Several who look at one model's steps, and a model that changes while they look."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_mixprec as mp
from keras_mixprec import inspection
from keras_mixprec.intercept import intercepted

pytestmark = pytest.mark.filterwarnings("ignore:Epoch .* steps overflowed")


class Huge(layers.Layer):
    """Doubles what is near float16's limit."""

    def call(self, x):
        return x * ops.cast(6e4, x.dtype)


def model_that_overflows():
    """Its layer 'huge' gives inf in float16 and about 3e5 in float32."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, kernel_initializer="ones", name="first"),
            Huge(name="huge"),
            layers.Rescaling(1e-6, dtype="float32", name="shrink"),
            layers.Dense(2, kernel_initializer="ones", dtype="float32", name="last"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return mp.convert(model, dry_run=False, keep_float32=["shrink", "last"])


@pytest.fixture
def built(monkeypatch):
    """The layers and calls of every twin that is made."""
    made, real = [], inspection.Instrument

    def record(model, chosen, calls):
        made.append(([x.name for x in model.layers if chosen(x.name)], calls))
        return real(model, chosen, calls)

    monkeypatch.setattr(inspection, "Instrument", record)
    return made


def fit(model, callbacks, epochs=1):
    x = np.ones((8, 4), "float32")
    y = np.ones((8, 2), "float32")
    arguments = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=callbacks, **arguments)


def test_two_inspectors_share_one_twin_and_see_what_each_asked_for(built):
    model = model_that_overflows()
    model.make_train_function()
    own = model.train_function
    first = mp.OverflowInspector(batches=[0], layers=["first"], calls=1)
    huge = mp.OverflowInspector(batches=[0, 1], layers=["huge"], calls=3)
    fit(model, [first, huge])
    assert built == [(["first", "huge"], 3)]
    assert [f.batch for f in first.report.frames] == [0]
    assert [f.batch for f in huge.report.frames] == [0, 1]
    assert {path for path, _ in first.report.frames[0].ranges} == {"first"}
    for frame in huge.report.frames:
        assert frame.of_kind("activation")["huge"].nonfinite == 16
        assert {path for path, _ in frame.ranges} == {"huge"}
    assert model.train_function is own


def test_an_inspector_that_left_is_not_measured_for_any_more(built):
    model = model_that_overflows()
    fit(model, [mp.OverflowInspector(batches=[0], layers=["first"])])
    fit(model, [mp.OverflowInspector(batches=[0], layers=["huge"])])
    assert [names for names, _ in built] == [["first"], ["huge"]]


def test_the_twin_and_what_was_compiled_for_it_go_with_the_last_inspector(monkeypatch):
    kept, real = [], inspection.Instrument

    def record(*arguments):
        twin = real(*arguments)
        kept.extend(map(weakref.ref, (twin, twin._function, twin._probes.log)))
        return twin

    monkeypatch.setattr(inspection, "Instrument", record)
    model = model_that_overflows()
    inspector = mp.OverflowInspector(batches=[0, 1])
    fit(model, [inspector])
    # What was measured stays on the device until somebody asks for it.
    assert len(inspector.report.frames) == 2
    gc.collect()
    assert len(kept) == 3
    assert [reference() for reference in kept] == [None] * 3


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the others compile in one way"
)
@pytest.mark.parametrize("compiled_by", ["xla", "xla, the measuring alone"])
def test_what_compiles_the_step_does_not_change_what_is_found(compiled_by, monkeypatch):
    def frame(**arguments):
        model = model_that_overflows()
        model.compile(model.optimizer, "mse", **arguments)
        inspector = mp.OverflowInspector(batches=[0])
        fit(model, [inspector])
        return inspector.report.frames[0].ranges

    plain = frame(jit_compile=False)
    if compiled_by == "xla":
        assert frame(jit_compile=True) == plain
    else:
        from keras_mixprec.backend import tensorflow

        monkeypatch.setattr(tensorflow, "gpus", lambda: ["one"])
        assert frame(jit_compile=False) == plain


@pytest.mark.parametrize("inspector_first", [True, False])
def test_beside_adaptive_precision_before_and_after_the_plan_changes(
    inspector_first, built
):
    model = model_that_overflows()
    adaptive = mp.AdaptivePrecision(patience=1, calm_epochs=9)
    inspector = mp.OverflowInspector(batches=[1])
    callbacks = [inspector, adaptive] if inspector_first else [adaptive, inspector]
    fit(model, callbacks, epochs=3)
    assert [(c.epoch, c.path) for c in adaptive.changes] == [(0, "huge")]
    frames = inspector.report.frames
    assert [(f.epoch, f.batch) for f in frames] == [(0, 1), (1, 1), (2, 1)]
    in_half, *in_float32 = (f.of_kind("activation")["huge"] for f in frames)
    assert (in_half.nonfinite, in_half.beyond) == (16, 0)
    # A twin of the old train function would still compute in float16.
    assert [(r.nonfinite, r.beyond) for r in in_float32] == [(0, 16)] * 2
    assert len(built) == 2
    assert not hasattr(model.train_function, "__self__")


def test_routes_that_are_kept_follow_a_call_that_changes():
    layer, kept, seen = layers.Dense(1), {}, []

    def around(operation, call, args, kwargs):
        seen.append(call)
        return call(*args, **kwargs)

    def call(x):
        return x + 1

    for own in (None, None, call):
        if own:
            layer.call = own
        with intercepted([layer], around, kept):
            layer(np.zeros((1, 1), "float32"))
    # Not made anew for the second time, and made anew for the third.
    assert seen[0] == seen[1] and seen[2] is call
    assert layer.call is call


def test_frames_at_a_loss_scale_of_0_are_frames():
    # Where Keras's own ends that halves without a bound.
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse")
    optimizer.dynamic_scale.assign(0.0)
    inspector = mp.OverflowInspector(batches=[0, 1])
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[inspector])
    assert [f.loss_scale for f in inspector.report.frames] == [0.0, 0.0]
