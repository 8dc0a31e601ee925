"""`OverflowInspector`: planted faults are named, and every count is exact."""

import contextlib
import functools
import json
import logging
import pathlib
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_mixprec as mp
from keras_mixprec import inspection
from keras_mixprec.callbacks.inspector import OverflowInspector
from keras_mixprec.range_report import Frame
from keras_mixprec.range_report import RangeReport
from keras_mixprec.ranges import Range

pytestmark = pytest.mark.slow

HALF = "mixed_float16"
BACKEND = keras.backend.backend()


class Times(keras.layers.Layer):
    """Multiplies by a number that can be changed."""

    def build(self, shape):
        self.factor = self.add_weight(
            shape=(), initializer="ones", trainable=False, autocast=False
        )

    def call(self, x):
        return x * ops.cast(self.factor, x.dtype)


def dense(units, name, **arguments):
    """A layer that adds up its inputs: its values can be worked out by hand."""
    arguments = {"kernel_initializer": "ones", "dtype": HALF, **arguments}
    return keras.layers.Dense(units, name=name, **arguments)


def product_loss(y_true, y_pred):
    """A loss whose gradient is `y_true`, the same for every prediction."""
    return ops.sum(y_true * y_pred, axis=-1)


def compiled(*layers, scale=1.0, rate=0.0, **arguments):
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    rule = {"growth_factor": 1.0, "backoff_factor": 1.0, "min_scale": 2.0**-20}
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(rate), scale, **rule)
    model.compile(optimizer, product_loss, **arguments)
    return model


def data(batches, units=2, batch_size=2):
    x = np.ones((batches * batch_size, 4), "float32")
    # The loss is a mean over the batch: with this its gradient is 1 everywhere.
    y = np.full((batches * batch_size, units), batch_size, "float32")
    return x, y


def inspect(model, inspector, x, y, epochs=1, batch_size=2, callbacks=()):
    with warnings.catch_warnings():
        # An epoch that was skipped whole warns by itself.
        warnings.filterwarnings("ignore", message="Epoch .* steps overflowed")
        model.fit(
            *(x, y),
            batch_size=batch_size,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[*callbacks, inspector],
        )
    return inspector.report


def all_frames(model, x, y, **arguments):
    return inspect(model, OverflowInspector(epochs=[0], **arguments), x, y).frames


# -- planted faults -----------------------------------------------------------------

# Per epoch: the factors of three layers, the loss scale, and who is to blame for what.
FAULTS = [
    ({}, 1.0, None),
    ({"loud": 1e6}, 1.0, ("loud", "activations overflow (4 of 4 values beyond 65504)")),
    ({"half": 6e4}, 1.0, ("half", "activations overflow (4 of 4 values beyond 65504)")),
    (
        {"quiet": 2.0**-20},
        1.0,
        ("hidden", "gradients underflow (0 of 4 values become 0, 4 subnormal)"),
    ),
    (
        {"quiet": 2.0**-30},
        1.0,
        ("hidden", "gradients vanish: underflow, or cut off (4 of 4 values are 0)"),
    ),
    ({"quiet": 2.0**-20}, 2.0**10, None),
    # 2 rows of 4 * 2**13 make 2**16 in the gradient of the kernel alone.
    (
        {},
        2.0**13,
        ("hidden", "gradients of its weights overflow (4 of 6 values beyond 65504)"),
    ),
]


class Plant(keras.callbacks.Callback):
    """Sets factors and the loss scale before each epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        factors, scale, _ = FAULTS[epoch]
        for name in ("loud", "half", "quiet"):
            self.model.get_layer(name).factor.assign(factors.get(name, 1.0))
        self.model.optimizer.dynamic_scale.assign(scale)


@pytest.fixture(scope="module")
def planted():
    """One frame for each of `FAULTS`."""
    model = compiled(
        dense(2, "first"),
        Times(name="loud", dtype="float32"),
        Times(name="half", dtype=HALF),
        dense(2, "hidden"),
        Times(name="quiet", dtype="float32"),
    )
    model.optimizer.build(model.trainable_variables)
    epochs = len(FAULTS)
    inspector = OverflowInspector(epochs=range(epochs))
    report = inspect(model, inspector, *data(1), epochs=epochs, callbacks=[Plant()])
    assert model.optimizer.overflow_count == sum(f.overflowed for f in report.frames)
    return report.frames


@pytest.mark.parametrize("epoch", range(len(FAULTS)))
def test_the_culprit_is_named(planted, epoch):
    assert planted[epoch].culprit() == FAULTS[epoch][2]
    assert planted[epoch].loss_scale == FAULTS[epoch][1]


def test_counts_of_activations_that_reach_a_million(planted):
    assert planted[1].ranges["first", "activation"] == Range(4, 0, 0, 0, 0, 0, 4.0, 4.0)
    loud = planted[1].ranges["loud", "activation"]
    assert loud == Range(4, 0, 4, 0, 0, 0, 4e6, 4e6)
    # In float16 they are gone, and with them their magnitude.
    half = planted[2].ranges["half", "activation"]
    assert half == Range(4, 4, 0, 0, 0, 0, 0.0, None)


def test_counts_of_gradients_that_underflow_at_scale_1(planted):
    low = 2.0**-20
    hidden = [frame.ranges["hidden", "gradient"] for frame in planted[3:6]]
    assert hidden[0] == Range(4, 0, 0, 4, 0, 0, low, low)
    assert hidden[1] == Range(4, 0, 0, 0, 0, 4, 0.0, None)
    assert hidden[2] == Range(4, 0, 0, 0, 0, 0, 2.0**-10, 2.0**-10)
    assert planted[3].ranges["quiet", "gradient"].max_abs == 1.0


def test_gradients_of_weights_overflow_while_those_of_outputs_do_not(planted):
    frame = planted[6]
    assert frame.overflowed
    assert frame.ranges["hidden", "gradient"].max_abs == 2.0**13
    assert frame.ranges["first", "weight_gradient"].max_abs == 2.0**15
    assert [f.overflowed for f in planted] == [False, True, True, *[False] * 3, True]


@pytest.fixture(scope="module")
def one_bad_batch():
    """One batch in a hundred has one NaN; the inspector waits for it."""
    keras.utils.set_random_seed(0)
    x, y = data(100)
    x[2 * 57] = np.nan
    model = compiled(dense(3, "first"), dense(2, "last", dtype="float32"), scale=8.0)
    plain = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            plain.append(self._model.train_function)

    inspector = OverflowInspector(frames=3)
    inspect(model, inspector, x, y, callbacks=[Watch()])
    return model, inspector, plain


def test_one_bad_batch_in_a_hundred_is_found(one_bad_batch):
    model, inspector, _ = one_bad_batch
    frames = inspector.report.frames
    assert [(f.epoch, f.batch) for f in frames] == [(0, 55), (0, 56), (0, 57)]
    assert [f.overflowed for f in frames] == [False, False, True]
    assert model.optimizer.overflow_count == 1


def test_the_layer_that_the_bad_batch_enters_is_named(one_bad_batch):
    before, bad = one_bad_batch[1].report.frames[1:]
    assert before.culprit() is None
    layer, what = bad.culprit()
    assert layer == "first" and "(3 of 6 values" in what
    assert bad.ranges["first", "activation"] == Range(6, 3, 0, 0, 0, 0, 4.0, 4.0)
    assert bad.ranges["first", "gradient"] == Range(6, 0, 0, 0, 0, 0, 16.0, 16.0)
    # Of the kernel all 4 * 3 are NaN, the bias has 3 gradients of 2 * 8 * 2.
    assert bad.ranges["first", "weight_gradient"].values == 15
    assert bad.ranges["first", "weight_gradient"].nonfinite == 12
    assert bad.ranges["last", "weight_gradient"].nonfinite == 6


def test_after_the_overflow_the_plain_function_runs_again(one_bad_batch):
    model, _, functions = one_bad_batch
    # Asked every 16 executions: the 64th batch is the last that is measured.
    assert functions[0] is functions[99] is model.train_function
    assert functions[1] is not functions[0] and functions[64] is not functions[0]
    assert functions[65] is functions[0]


# -- the frame is the training step -------------------------------------------------


def trained(callbacks):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, activation="relu", dtype=HALF),
            keras.layers.BatchNormalization(dtype=HALF),
            keras.layers.Dropout(0.5, seed=7, dtype=HALF),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1, 0.9), 256.0)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
    x[9] = x[13] = np.inf
    model.fit(
        *(x, x[:, :1]), batch_size=4, shuffle=False, verbose=0, callbacks=callbacks
    )
    return model


def test_measuring_changes_nothing_bit_for_bit():
    # Of the bad batches the first is measured, the second is not.
    inspector = OverflowInspector(batches=range(0, 6, 2))
    measured, plain = trained([inspector]), trained([])
    assert [f.overflowed for f in inspector.report.frames] == [False, True, False]
    assert measured.optimizer.overflow_count == plain.optimizer.overflow_count == 2
    variables = zip(
        measured.variables + measured.optimizer.variables,
        plain.variables + plain.optimizer.variables,
        strict=True,
    )
    for a, b in variables:
        a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
        np.testing.assert_array_equal(a, b, strict=True)


def test_checkpoints_are_plain_and_a_second_run_starts_anew(tmp_path):
    path = str(tmp_path / "model.weights.h5")
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    model = compiled(dense(2, "first"))
    inspector = OverflowInspector(frames=2)
    inspect(model, inspector, *data(2), callbacks=[save])
    inspect(model, inspector, *data(4))
    assert [f.batch for f in inspector.report.frames] == [2, 3]
    other = compiled(dense(2, "first"))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    assert len(model.trainable_variables) == 2


def test_batches_that_are_not_chosen_run_the_models_own_function(monkeypatch):
    built = []
    real = inspection.Instrument
    monkeypatch.setattr(
        inspection, "Instrument", lambda *a: built.append(a) or real(*a)
    )
    model = compiled(dense(2, "first"))
    inspector = OverflowInspector(epochs=[5])
    functions = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            functions.append(self._model.train_function)

    inspect(model, inspector, *data(3), callbacks=[Watch()])
    assert built == [] and len(set(map(id, functions))) == 1
    assert inspector.report.frames == []


def test_no_hook_after_a_batch_so_that_dispatch_stays_asynchronous():
    model = compiled(dense(2, "first"))
    inspected = keras.callbacks.CallbackList([OverflowInspector()], model=model)
    plain = keras.callbacks.CallbackList([], model=model)
    assert inspected._async_train == plain._async_train


def test_a_failing_step_leaves_the_models_own_function_behind(monkeypatch):
    def fails(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(inspection.Instrument, "run", fails)
    model, inspector = compiled(dense(2, "first")), OverflowInspector()
    model.make_train_function()
    own = model.train_function
    with pytest.raises(RuntimeError, match="planted"):
        inspect(model, inspector, *data(1))
    assert model.train_function is own


# -- models -------------------------------------------------------------------------


def test_nested_and_shared_layers_of_functional_models():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), dense(4, "deep")], name="inner")
    shared = dense(4, "shared")
    x = shared(inner(shared(inputs)))
    outputs = dense(2, "last", dtype="float32")(x)
    model = keras.Model(inputs, outputs)
    model.compile(mp.LossScaleOptimizer("sgd", 4.0), product_loss)
    (frame,) = all_frames(model, *data(1))
    assert list(frame.of_kind("activation")) == ["shared", "inner/deep", "last"]
    # Twice 2 * 4 values: all 4, then all 64.
    expected = Range(16, 0, 0, 0, 0, 0, 64.0, 4.0)
    assert frame.ranges["shared", "activation"] == expected
    assert frame.ranges["inner/deep", "activation"].max_abs == 16.0
    # 4 * 2 units after the last call, times 4 * 4 on the way to the first.
    assert frame.ranges["shared", "gradient"].max_abs == 128.0
    assert frame.ranges["shared", "gradient"].min_abs == 8.0


class Block(keras.layers.Layer):
    """A layer of layers that Python code calls, with two outputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one = dense(4, "one")
        self.two = dense(4, "two")

    def build(self, shape):
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x):
        return self.one(x), self.two(x)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.embedding = keras.layers.Embedding(10, 4, "ones", dtype=HALF, name="ids")
        self.rnn = keras.layers.SimpleRNN(4, dtype=HALF, name="rnn")
        self.block = Block(dtype=HALF, name="block")
        self.unused = keras.layers.ReLU(name="unused")
        self.head = dense(2, "head", dtype="float32")

    def call(self, ids):
        x = self.embedding(ids)
        one, two = self.block(self.rnn(x))
        return self.head(one + two)


def test_subclassed_models():
    model = Subclassed()
    model.compile(mp.LossScaleOptimizer("sgd", 2.0), product_loss)
    ids = np.array([[1, 2, 3], [1, 1, 1]], "int32")
    _, y = data(1)
    # On TensorFlow the first batch builds the model.
    inspector = OverflowInspector(epochs=[0])
    (frame,) = inspect(
        model, inspector, np.tile(ids, (2, 1)), np.tile(y, (2, 1))
    ).frames
    paths = list(frame.of_kind("activation"))
    assert paths == ["ids", "rnn", "block/one", "block/two", "block", "head"]
    assert frame.ranges["ids", "activation"].values == 2 * 3 * 4
    assert frame.ranges["block", "activation"].values == 2 * (2 * 4)
    assert frame.ranges["ids", "weight_gradient"].max_abs > 0
    assert ("unused", "activation") not in frame.ranges
    assert frame.ranges["head", "gradient"] == Range(4, 0, 0, 0, 0, 0, 2.0, 2.0)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras runs one step per execution")
def test_every_step_of_an_execution_is_a_frame():
    model = compiled(dense(2, "first"), steps_per_execution=4)
    x, y = data(10)
    for i in range(10):
        x[2 * i : 2 * i + 2] = i + 1
    inspector = OverflowInspector(batches=[1, 2, 9])
    frames = inspect(model, inspector, x, y).frames
    assert [f.batch for f in frames] == [1, 2, 9]
    largest = [f.ranges["first", "activation"].max_abs for f in frames]
    assert largest == [8.0, 12.0, 40.0]


def test_chosen_layers_epochs_and_batches():
    model = compiled(dense(2, "first"), dense(2, "second"), dense(2, "last"))
    inspector = OverflowInspector(epochs=[1], batches=[0, 2], layers=["*st"])
    frames = inspect(model, inspector, *data(3), epochs=3).frames
    assert [(f.epoch, f.batch) for f in frames] == [(1, 0), (1, 2)]
    assert list(frames[0].of_kind("activation")) == ["first", "last"]
    assert list(frames[0].of_kind("weight_gradient")) == ["first", "last"]


def test_a_model_without_an_optimizer_is_left_alone(caplog):
    model = keras.Sequential([keras.Input((4,)), dense(2, "first")])
    model.compile(None, "mse")
    inspector = OverflowInspector()
    inspector.set_model(model)
    with caplog.at_level(logging.WARNING, "keras_mixprec"):
        inspector.on_train_begin()
    inspector.on_train_batch_begin(0)
    assert "looks at nothing" in caplog.text


def test_counts_beyond_float16_are_exact_in_float16_layers():
    model = compiled(dense(40_001, "wide"))
    (frame,) = all_frames(model, *data(1, units=40_001))
    for kind in ("activation", "gradient"):
        assert frame.ranges["wide", kind].values == 80_002


# -- the report ---------------------------------------------------------------------


def test_the_table_names_the_culprit_and_every_layer(one_bad_batch):
    text = one_bad_batch[1].report.table()
    assert text.startswith("Epoch 1, batch 57, loss scale 8: 'first': activations")
    row = next(line for line in text.splitlines() if line.startswith("first act"))
    assert row.split()[2:] == ["4", "4", "50.00%", *["0.00%"] * 4]
    assert str(one_bad_batch[1].report).count("Epoch 1, batch") == 3


def test_dict_and_json_hold_the_same(one_bad_batch, tmp_path):
    report = one_bad_batch[1].report
    columns = report.to_dict()
    assert len({len(values) for values in columns.values()}) == 1
    bad = [i for i, batch in enumerate(columns["batch"]) if batch == 57]
    first = next(i for i in bad if columns["layer"][i] == "first")
    assert columns["kind"][first] == "activation"
    assert columns["nonfinite_share"][first] == 0.5
    path = tmp_path / "ranges.json"
    assert json.loads(report.to_json(path)) == columns
    assert json.loads(path.read_text()) == columns
    assert RangeReport([]).to_dict() == {}


def test_the_heat_map_is_a_png(one_bad_batch, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "map.png"
    report = one_bad_batch[1].report
    report.heat_map(path)
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 100
    red = (pixels[..., 0] > 0.9) & (pixels[..., 1] < 0.2) & (pixels[..., 2] < 0.2)
    assert red.any(), "the overflow is not marked"
    with pytest.raises(ValueError, match="Received: kind='weights' and 3 frames"):
        report.heat_map(path, "weights")


def test_histograms_reach_tensorboard(one_bad_batch, tmp_path):
    pytest.importorskip("tensorboard")
    one_bad_batch[1].report.to_tensorboard(tmp_path)
    (file,) = pathlib.Path(tmp_path).iterdir()
    tags = {f"mixed_precision/log2_max_abs/{k}" for k in ("activation", "gradient")}
    written = file.read_bytes()
    assert all(tag.encode() in written for tag in tags)


def test_where_a_backward_overflow_starts():
    good, bad = Range(4, 0, 0, 0, 0, 0, 1.0, 1.0), Range(4, 2, 0, 0, 0, 0, 1.0, 1.0)

    def culprit(**gradients):
        found = {(name, "activation"): good for name in gradients}
        found |= {(name, "gradient"): r for name, r in gradients.items()}
        return Frame(0, 0, 1.0, found).culprit()

    assert culprit(a=good, b=good) is None
    assert culprit(a=bad, b=good)[0] == "b"
    assert culprit(a=bad, b=bad)[0] == "the loss"


# -- arguments ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": [-1]}, r"`epochs` must be integers >= 0.*Received: epochs=\[-1\]"),
        ({"batches": []}, r"at least one. Received: batches=\[\]"),
        ({"batches": [0.5]}, r"batches=\[0.5\]"),
        ({"frames": 0}, "`frames` must be an integer >= 1. Received: frames=0"),
        ({"calls": "2"}, "calls='2'"),
        ({"layers": [3]}, r"glob patterns of layer paths. Received: layers=\[3\]"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        OverflowInspector(**arguments)


@pytest.mark.skipif(BACKEND == "jax", reason="a compiled step always updates")
def test_a_step_that_updates_nothing_leaves_no_frame():
    class Idle(keras.Sequential):
        """Idles in every second step."""

        seen = 0

        def train_step(self, data):
            self.seen += 1
            if self.seen % 2:
                return super().train_step(data)
            return self.get_metrics_result()

    model = Idle([keras.Input((4,)), dense(2, "first")])
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.0), 1.0)
    model.compile(optimizer, product_loss, run_eagerly=True)
    inspector = OverflowInspector(batches=range(5))
    inspect(model, inspector, *data(5))
    assert [f.batch for f in inspector.report.frames] == [0, 2, 4]


class Halved(keras.Sequential):
    """Computes with the gradients before it applies them."""

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            scaled = self.optimizer.scale_loss(loss)
        weights = self.trainable_variables
        grads = tape.gradient(scaled, weights)
        grads = [g if g is None else g * 0.5 for g in grads]
        self.optimizer.apply(grads, weights)
        return {"loss": loss}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="sparse gradients")
def test_a_step_of_ones_own_may_compute_with_gradients():
    model = Halved([keras.Input((4,)), dense(2, "first")])
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.0), 1.0)
    model.compile(optimizer, product_loss)
    inspector = OverflowInspector(batches=[1])
    inspect(model, inspector, *data(2))
    (frame,) = inspector.report.frames
    found = frame.ranges["first", "weight_gradient"]
    assert found.max_abs == 1.0


class Anew(keras.layers.Layer):
    """Two layers, computed anew in the backward pass if `remat`."""

    def __init__(self, remat, **arguments):
        super().__init__(**arguments)
        self.remat = remat
        self.inner = [dense(4, "inner"), dense(2, "last")]

    def build(self, shape):
        self.inner[0].build(shape)
        self.inner[1].build((None, 4))

    def call(self, x):
        def call(x):
            return self.inner[1](self.inner[0](x))

        return keras.remat(call)(x) if self.remat else call(x)


class Either(keras.layers.Layer):
    """The one of two layers that a condition chooses, and once more the first."""

    def __init__(self, bare=False, **arguments):
        super().__init__(**arguments)
        self.bare = bare
        self.inner = [dense(4, "chosen"), dense(4, "other")]

    def build(self, shape):
        for layer in self.inner:
            layer.build(shape)

    def call(self, x):
        chosen, other = self.inner
        if self.bare:
            other = functools.partial(ops.cast, dtype=HALF.removeprefix("mixed_"))
        first = ops.cond(ops.sum(x) > 0, lambda: chosen(x), lambda: other(x))
        return first + chosen(x * 4)


def ranges_of(*layers, **arguments):
    inspector = OverflowInspector(batches=[1])
    inspect(compiled(*layers, **arguments), inspector, *data(2))
    (frame,) = inspector.report.frames
    return frame.ranges


# Keras 3.15.1 cannot compile a model made in the scope on TensorFlow.
@pytest.mark.parametrize("scope", [False] if BACKEND == "tensorflow" else [False, True])
def test_what_is_computed_anew_in_the_backward_pass_is_measured_alike(scope):
    with keras.RematScope(mode="full") if scope else contextlib.nullcontext():
        anew = ranges_of(Anew(not scope, name="block"), dense(2, "end"))
    once = ranges_of(Anew(False, name="block"), dense(2, "end"))
    assert anew == once and len(once) == 11, (anew, once)


# On torch a condition is Python's.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    "jit_compile", [False] if BACKEND == "torch" else [True, False]
)
# Whether the other branch calls no layer.
@pytest.mark.parametrize("bare", [False, True])
def test_layers_in_the_branches_of_a_condition_are_measured(bare, jit_compile):
    either = Either(bare, name="either")
    found = ranges_of(either, dense(2, "end"), jit_compile=jit_compile)
    # Of two calls, of which one lies in a branch; the other branch was not taken.
    chosen = found["either/chosen", "activation"]
    assert (chosen.values, chosen.max_abs, chosen.min_abs) == (16, 16.0, 4.0)
    chosen = found["either/chosen", "gradient"]
    assert (chosen.values, chosen.max_abs, chosen.min_abs) == (16, 2.0, 2.0)
    assert ("either/other", "activation") not in found
    assert ("either/other", "gradient") not in found
