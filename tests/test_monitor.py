"""`MixedPrecisionMonitor`: exact keys, for every reader, whatever the order."""

import csv

import keras
import pytest
from support import classifier
from support import compiled
from support import data
from support import half_classifier

import keras_mixprec as mp
from keras_mixprec import hardware

TORCH = keras.backend.backend() == "torch"
KEYS = {"loss_scale", "overflow_count", "overflow_total", "host_memory_mb"}
BAD = list(range(32, 64)) + list(range(96, 128))


class Reader(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.seen = dict(logs)


def fit(model, callbacks, epochs=2, samples=160, bad=BAD, **kwargs):
    x, y = data(samples, bad)
    kwargs = {"batch_size": 32, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **kwargs).history


@pytest.mark.parametrize(
    "mode", [{}] if TORCH else [{}, {"steps_per_execution": 4}], ids=str
)
def test_counts_are_exact(mode):
    history = fit(half_classifier(**mode), [mp.MixedPrecisionMonitor()], epochs=3)
    assert history["overflow_count"] == [2, 2, 2]
    assert history["overflow_total"] == [2, 4, 6]
    assert history["loss_scale"] == [2.0**13, 2.0**11, 2.0**9]
    assert all(value > 1 for value in history["host_memory_mb"])


@pytest.mark.parametrize("first", [True, False])
def test_every_reader_sees_the_keys_whatever_the_order(first, tmp_path, capsys):
    reader = Reader()
    others = [keras.callbacks.CSVLogger(tmp_path / "log.csv"), reader]
    monitor = [mp.MixedPrecisionMonitor()]
    callbacks = monitor + others if first else others + monitor
    history = fit(half_classifier(), callbacks, verbose=2)
    assert set(history) >= KEYS
    assert set(reader.seen) >= KEYS
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["overflow_count"] for row in rows] == ["2", "2"]
    printed = capsys.readouterr().out
    assert "loss_scale: 8192" in printed and "overflow_count: 2" in printed


def test_the_list_that_was_passed_keeps_its_order():
    callbacks = [Reader(), mp.MixedPrecisionMonitor()]
    before = list(callbacks)
    fit(half_classifier(), callbacks, epochs=1)
    assert callbacks == before


def test_tensorboard_receives_the_keys(tmp_path):
    pytest.importorskip("tensorboard")
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras's TensorBoard callback writes through TensorFlow")
    board = keras.callbacks.TensorBoard(tmp_path)
    fit(half_classifier(), [board, mp.MixedPrecisionMonitor()])
    events = loader.EventAccumulator(str(tmp_path / "train")).Reload()
    assert "epoch_loss_scale" in events.Tags()["tensors"]


def test_says_once_that_there_is_no_accelerator(caplog):
    fit(half_classifier(), [mp.MixedPrecisionMonitor()], epochs=3)
    assert caplog.text.count("No accelerator is visible") == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_is_summed_and_per_device_where_several(monkeypatch, devices):
    resets = []
    counters = {f"GPU:{i}": ((i + 1) * 2**20, (i + 3) * 2**20) for i in range(devices)}
    monkeypatch.setattr(hardware.engine, "memory_info", lambda: counters)
    monkeypatch.setattr(hardware.engine, "reset_peak_memory", lambda: resets.append(1))
    history = fit(half_classifier(), [mp.MixedPrecisionMonitor()])
    assert len(resets) == 2
    assert "host_memory_mb" not in history
    assert history["gpu_memory_mb"] == [1.0 if devices == 1 else 3.0] * 2
    assert history["gpu_memory_peak_mb"] == [3.0 if devices == 1 else 7.0] * 2
    assert ("gpu_memory_peak_mb_1" in history) == (devices == 2)
    if devices == 2:
        assert history["gpu_memory_mb_1"] == [2.0, 2.0]


def test_keras_own_wrapper_is_logged_and_what_is_missing_said_once(caplog):
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    model = compiled(classifier(dtype="mixed_float16"), theirs)
    monitor = mp.MixedPrecisionMonitor()
    history = fit(model, [monitor], bad=())
    fit(model, [monitor], bad=())
    assert history["loss_scale"] == [2.0**15] * 2
    assert "overflow_count" not in history
    assert caplog.text.count("overflow_total are missing") == 1


def test_a_float16_model_without_scaling_is_noticed(caplog):
    model = compiled(classifier(dtype="mixed_float16"), auto_scale_loss=False)
    history = fit(model, [mp.MixedPrecisionMonitor()], bad=())
    assert "loss_scale" not in history
    assert caplog.text.count("model.compile(mp.LossScaleOptimizer(") == 1


def test_a_float32_model_is_not_bothered(caplog):
    history = fit(compiled(classifier()), [mp.MixedPrecisionMonitor()], bad=())
    assert "LossScaleOptimizer" not in caplog.text
    assert set(history) & KEYS == {"host_memory_mb"}


def test_an_uncompiled_model_is_an_error():
    callbacks = keras.callbacks.CallbackList(
        [mp.MixedPrecisionMonitor()], model=classifier()
    )
    with pytest.raises(ValueError, match="needs a compiled model. Received"):
        callbacks.on_train_begin()


def test_works_in_evaluate_and_predict():
    model, (x, y) = half_classifier(), data(32)
    model.evaluate(x, y, verbose=0, callbacks=[mp.MixedPrecisionMonitor()])
    model.predict(x, verbose=0, callbacks=[mp.MixedPrecisionMonitor()])


def test_only_the_chief_of_several_processes_says_anything(monkeypatch, caplog):
    from keras_mixprec.backend import engine

    monkeypatch.setattr(engine, "is_chief", lambda model: False)
    model = half_classifier()
    history = model.fit(*data(), verbose=0, callbacks=[mp.MixedPrecisionMonitor()])
    assert not caplog.records
    assert "loss_scale" in history.history


def test_says_where_overflows_began_after_epochs_with_overflows_only(caplog):
    model = half_classifier()
    x, y = data(96, bad=range(32, 64))
    monitor = mp.MixedPrecisionMonitor(verbose=1)
    fit = {"batch_size": 32, "shuffle": False, "verbose": 0, "callbacks": [monitor]}
    model.fit(x, y, **fit)
    model.fit(*data(96), initial_epoch=1, epochs=2, **fit)
    (said,) = [r.message for r in caplog.records if "overflowed" in r.message]
    assert said.startswith(
        "Epoch 1: 1 step overflowed this epoch; in it the loss itself was not finite"
    )


def test_tensor_cores_are_judged_by_an_epoch_without_its_first_batch(
    monkeypatch, caplog
):
    idle, busy = {"tensor_core_util": 0.5}, {"tensor_core_util": 57.0}
    found, started = [], []

    def start(power):
        assert not power
        started.append(found[len(started)])
        return started[-1]

    monkeypatch.setattr(hardware, "start_activity", start)
    monkeypatch.setattr(hardware, "read_activity", lambda start: dict(start or {}))
    # From the beginning of an epoch, and from its second batch, in two epochs.
    found[:] = [idle, busy, idle, busy]
    history = fit(half_classifier(), [mp.MixedPrecisionMonitor()])
    assert history["tensor_core_util"] == [0.5, 0.5]
    assert len(started) == 4 and "Tensor cores" not in caplog.text
    started.clear()
    # Once said, nothing is measured for it any more.
    found[:] = [busy, idle, busy]
    fit(half_classifier(), [mp.MixedPrecisionMonitor()])
    assert caplog.text.count("Tensor cores were busy 0.5%") == 1
    assert len(started) == 3
    started.clear()
    # Before validation, which may compile as well.
    order = []
    monkeypatch.setattr(
        hardware, "read_activity", lambda start: order.append(start) or {}
    )
    found[:] = [idle, busy]
    test = keras.callbacks.LambdaCallback()
    test.on_test_begin = lambda logs=None: order.append("test")
    callbacks = [mp.MixedPrecisionMonitor(), test]
    fit(half_classifier(), callbacks, epochs=1, validation_data=data(32))
    assert order.index(busy) < order.index("test")
    monkeypatch.setattr(hardware, "read_activity", lambda start: dict(start or {}))
    started.clear()
    # An epoch of one batch may be nothing but compilation.
    found[:] = [idle, idle]
    fit(half_classifier(), [mp.MixedPrecisionMonitor()], samples=32, bad=[])
    assert caplog.text.count("Tensor cores") == 1
