"""Exporting after `to_float32`, with the real converters and runtimes."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32

BACKEND = keras.config.backend()
tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")

# What the converters themselves warn of.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    x = keras.Input((8, 8, 3), batch_size=2, name="image")
    y = layers.Conv2D(8, 3, activation="relu")(x)
    y = layers.BatchNormalization()(y)
    y = layers.GlobalAveragePooling2D()(y)
    return keras.Model(x, layers.Dense(3, "softmax")(y))


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")


@pytest.fixture
def exported(model, images):
    wanted = keras.ops.convert_to_numpy(model(images, training=False))
    return to_float32(convert(model)), wanted


@pytest.mark.skipif(BACKEND == "torch", reason="Keras needs torch_xla for that")
def test_saved_model(exported, images, tmp_path):
    tf = pytest.importorskip("tensorflow")
    model, wanted = exported
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    got = loaded.serve(images)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@tensorflow_only
def test_saved_model_in_half_precision(model, images, tmp_path):
    tf = pytest.importorskip("tensorflow")
    convert(model)
    wanted = keras.ops.convert_to_numpy(model(images, training=False))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    got = loaded.serve(images)
    np.testing.assert_allclose(got, wanted, rtol=1e-2)


@tensorflow_only
def test_litert(exported, images, tmp_path):
    tf = pytest.importorskip("tensorflow")
    model, wanted = exported
    model.export(tmp_path / "model.tflite", format="litert", verbose=False)
    interpreter = tf.lite.Interpreter(model_path=str(tmp_path / "model.tflite"))
    runner = interpreter.get_signature_runner()
    got = next(
        iter(runner(**{next(iter(runner.get_input_details())): images}).values())
    )
    assert got.dtype == "float32"
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_onnx(exported, images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    needs = {"tensorflow": "tf2onnx", "jax": "jax2onnx", "torch": "onnxscript"}
    pytest.importorskip(needs[BACKEND])
    model, wanted = exported
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: images})[0]
    assert got.dtype == "float32"
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
