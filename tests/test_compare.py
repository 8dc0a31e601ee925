"""`compare_precision`: the culprit stands out, and the model is left alone."""

import json
import math

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from planted import MaskedMean
from planted import Squares
from planted import inputs
from planted import model_with
from planted import squaring
from support import assert_same_bits
from support import snapshot

import keras_mixprec as mp
from keras_mixprec.compare import agreement
from keras_mixprec.difference import difference
from keras_mixprec.precisions import precisions_of


def test_the_culprit_stands_out_from_those_that_inherit():
    model, (x, _) = model_with(squaring), inputs(32)
    report = mp.compare_precision(model, x)
    assert report.culprit().path == "fault"
    assert report["fault"].own_error > 0.9
    assert report["fault"].inherited_error < 0.01
    after = report["dense_1"]
    assert after.own_error < 0.01
    assert after.inherited_error > 0.9
    assert after.error > 0.9
    assert report.relative_error > 0.01
    assert report.nonfinite == 0


def test_an_error_inside_a_layer_is_the_sublayers():
    class Around(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = Squares(name="inner")

        def call(self, x):
            return x + self.inner(x * 1000)

    with mp.policy_scope("mixed_float16"):
        model = keras.Sequential(
            [keras.Input((8,)), Around(name="around"), layers.Dense(2, dtype="float32")]
        )
    report = mp.compare_precision(model, inputs(16)[0])
    assert report.culprit().path == "around/inner"
    assert report["around/inner"].own_error > 0.9
    assert report["around"].own_error < 0.01
    assert report["around"].error > 0.1


@pytest.mark.filterwarnings("ignore:Epoch .* steps overflowed")
@pytest.mark.parametrize("converted", [False, True])
def test_the_model_is_left_as_it_was(converted):
    model, (x, y) = model_with(squaring), inputs(64)
    model.add(layers.BatchNormalization())
    model.build((None, 8))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    model.predict(x, verbose=0)
    if converted:
        mp.convert(model)
        model.fit(x, y, verbose=0)
    before = precisions_of(model), snapshot(model, model.optimizer)
    functions = model.train_function, model.predict_function, model.test_function
    kind = type(model)
    mp.compare_precision(model, x)
    assert precisions_of(model) == before[0]
    assert_same_bits(before[1], snapshot(model, model.optimizer))
    after = model.train_function, model.predict_function, model.test_function
    assert all(a is b for a, b in zip(functions, after, strict=True))
    assert type(model) is kind
    assert "call" not in vars(model.layers[0])


def test_the_numbers_are_those_of_predict():
    model, (x, _) = model_with(squaring), inputs(256)
    # Operation by operation, as the comparison runs the model.
    model.compile(run_eagerly=True)
    alone = {"batch_size": 256, "verbose": 0}
    exact = model.predict(x, **alone)
    report = mp.compare_precision(model, x)
    assert model.predict(x, **alone).tobytes() == exact.tobytes()
    half = mp.convert(model, dry_run=False).predict(x, **alone)
    off = half.astype("float64") - exact
    relative = np.linalg.norm(off) / np.linalg.norm(exact)
    assert report.relative_error == pytest.approx(relative, rel=1e-6)
    assert report.max_abs_error == pytest.approx(np.abs(off).max(), rel=1e-6)
    same = np.mean(half.argmax(-1) == exact.argmax(-1))
    assert 0 < report.agreement == same < 1


def test_what_is_measured_is_what_the_model_has():
    model, (x, _) = model_with(squaring), inputs(32)
    mp.convert(model, keep_float32=["fault"])
    report = mp.compare_precision(model, x)
    assert report["fault"].policy == "float32"
    assert report["fault"].own_error == 0
    assert report.relative_error < 0.01
    assert report.policy == "mixed_float16"
    assert mp.compare_precision(model, x, policy="mixed_bfloat16").policy == (
        "mixed_bfloat16"
    )


def test_a_float32_model_against_itself_has_no_error():
    model, (x, _) = model_with(squaring), inputs(32)
    report = mp.compare_precision(model, x, policy="float32")
    assert (report.relative_error, report.max_abs_error) == (0, 0)
    assert report.agreement == 1
    assert report.culprit() is None


def test_another_reference():
    model, (x, _) = model_with(squaring), inputs(32)
    report = mp.compare_precision(
        model, x, reference="mixed_bfloat16", policy="float32"
    )
    assert 0 < report.relative_error < 0.1


def test_outputs_that_are_not_finite():
    with mp.policy_scope("mixed_float16"):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, kernel_initializer="ones", name="large"),
                layers.Dense(2, dtype="float32"),
            ]
        )
    x = np.full((5, 4), 3e4, "float32")
    report = mp.compare_precision(model, x)
    assert math.isinf(report.relative_error)
    assert report.nonfinite == 10
    assert report["large"].nonfinite == 15
    assert report.culprit().path == "large"
    assert report.agreement == 0


def test_a_layer_called_twice_and_the_models_own_code():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(8)
            self.out = layers.Dense(2)

        def call(self, x):
            y = self.dense(self.dense(x))
            return self.out(ops.square(y * 1e4) / 1e8)

    with mp.policy_scope("mixed_float16"):
        model = Twice()
    report = mp.compare_precision(model, inputs(16)[0])
    # What its own code hands to the last layer is inf.
    assert report.culprit().path == model.name
    assert report["dense"].own_error < 0.01


def test_an_operation_that_is_no_layer_passes():
    x = keras.Input((1024, 2))
    y = MaskedMean(name="mean")(layers.Dense(2)(x)) + 1.0
    model = keras.Model(x, layers.Dense(2)(y))
    data = np.full((4, 1024, 2), 500.0, "float32")
    report = mp.compare_precision(model, data)
    assert report.culprit().path == "mean"


def test_report_as_table_dict_and_json(tmp_path):
    report = mp.compare_precision(model_with(squaring), inputs(32)[0])
    lines = str(report).splitlines()
    assert "agreement" in lines[0] and "mixed_float16 against float32" in lines[0]
    assert [line for line in lines if "<--" in line][0].startswith("fault")
    assert len(lines) == 2 + len(report.layers)
    text = report.to_json(tmp_path / "report.json")
    assert json.loads(text) == report.to_dict()
    assert (tmp_path / "report.json").read_text() == text
    assert report.to_dict()["layers"][0]["path"] == "dense"
    with pytest.raises(KeyError, match="Received: 'nothing'"):
        report["nothing"]


def test_arguments():
    model, (x, _) = model_with(squaring), inputs(8)
    with pytest.raises(TypeError, match="Expected `model`"):
        mp.compare_precision("model", x)
    with pytest.raises(ValueError, match="Received: policy='float16'"):
        mp.compare_precision(model, x, reference="float16")
    with pytest.raises(ValueError, match="Received: policy='half'"):
        mp.compare_precision(model, x, policy="half")


def test_errors_by_hand():
    reference = np.array([3.0, 4.0, np.inf], "float32")
    found = difference(reference, np.array([3.0, 4.5, 0.0], "float32"))
    assert found.relative == 0.5 / 5
    assert (found.max_abs, found.nonfinite, found.values, found.lost) == (0.5, 0, 2, 1)
    assert math.isinf(difference(reference, np.full(3, np.nan, "float32")).relative)
    assert math.isnan(difference(np.full(2, np.nan), np.zeros(2)).relative)
    assert difference(np.zeros(2), np.zeros(2)).relative == 0


def test_agreement_by_hand():
    a = np.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]])
    b = np.array([[0.2, 0.8], [0.4, 0.6], [np.nan, 0.9]])
    assert agreement(a, b) == pytest.approx(1 / 3)
    assert agreement(np.array([[0.2], [0.7]]), np.array([[0.6], [0.8]])) == 0.5
    assert agreement(np.array([[2.0], [-7.0]]), np.array([[2.0], [-7.0]])) is None
