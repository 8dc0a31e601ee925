"""What the monitor writes on request: every number arrives, and can be read back."""

import json
import math
import sys

import keras
import numpy as np
import pytest
from support import classifier
from support import compiled
from support import data
from support import half_classifier

import keras_mixprec as mp
from keras_mixprec.attribution import Attribution
from keras_mixprec.backend import engine
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.run_record import ATTRIBUTE
from keras_mixprec.run_record import JsonLines
from keras_mixprec.run_record import read_json_lines

BAD = range(32, 64)


def fit(model, monitor, epochs=2, bad=BAD, callbacks=(), **kwargs):
    x, y = data(160, bad)
    kwargs = {"batch_size": 32, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(x, y, epochs=epochs, callbacks=[monitor, *callbacks], **kwargs)


# -- JSON lines ---------------------------------------------------------------------


def test_json_lines_hold_the_logs_and_where_overflows_began(tmp_path):
    path = tmp_path / "runs" / "half.jsonl"
    history = fit(half_classifier(), mp.MixedPrecisionMonitor(json_lines=path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    for key, values in history.history.items():
        assert [row[key] for row in rows] == pytest.approx(values), key
    overflows = {"began": {}, "nonfinite_loss": 1}
    for row in rows:
        assert row["overflows"].items() >= overflows.items()
        assert set(row["overflows"]["spread"].values()) == {1}


def test_an_epoch_without_overflow_says_nothing_of_them(tmp_path):
    path = tmp_path / "log.jsonl"
    fit(half_classifier(), mp.MixedPrecisionMonitor(json_lines=path), bad=())
    assert all("overflows" not in row for row in read_json_lines(path))


def test_the_plan_goes_beside_them(tmp_path):
    model, path = half_classifier(), tmp_path / "half.jsonl"
    fit(model, mp.MixedPrecisionMonitor(json_lines=path), epochs=1)
    plan = PrecisionPlan.from_json(tmp_path / "half.plan.json")
    rows = {row.path: row.policy for row in plan}
    assert rows["dense"] == "mixed_float16" and rows["dense_1"] == "float32"
    assert not list(tmp_path.glob("*.part"))


def test_a_float32_model_has_no_plan(tmp_path):
    monitor = mp.MixedPrecisionMonitor(json_lines=tmp_path / "full.jsonl")
    fit(compiled(classifier()), monitor, bad=())
    assert [p.name for p in tmp_path.iterdir()] == ["full.jsonl"]


def test_a_second_run_appends_and_a_torn_line_is_left_out(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    monitor = mp.MixedPrecisionMonitor(json_lines=path)
    model = half_classifier()
    fit(model, monitor, epochs=1)
    # As a process that is killed while it writes leaves it.
    path.write_text(path.read_text() + '{"epoch": 1, "overflows": {"began": {}')
    fit(model, monitor, initial_epoch=1, epochs=3)
    assert [row["epoch"] for row in read_json_lines(path)] == [0, 1, 2]
    assert "Line 2 of" in caplog.text


def test_numbers_that_json_lacks_are_strings(tmp_path):
    lines = JsonLines(tmp_path / "log.jsonl")
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)}
    lines.write(3, values | {"e": "text", "f": 2.0**15}, None)

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "log.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row.pop("f") == 32768
    assert row == {"epoch": 3, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.5}


@pytest.mark.parametrize("line", ["epoch,loss", "[1]", "3"])
def test_a_line_that_is_no_object_raises(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"loss": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="one JSON object in each line.*in line 2"):
        read_json_lines(path)


def test_only_the_chief_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "is_chief", lambda model: False)
    monitor = mp.MixedPrecisionMonitor(json_lines=tmp_path / "log.jsonl")
    fit(half_classifier(), monitor, epochs=1)
    assert not list(tmp_path.iterdir())


def test_a_history_keeps_where_overflows_began():
    history = fit(half_classifier(), mp.MixedPrecisionMonitor(), epochs=3)
    kept = getattr(history, ATTRIBUTE)
    assert list(kept) == [0, 1, 2]
    assert all(isinstance(where, Attribution) for where in kept.values())
    assert [where.nonfinite_loss for where in kept.values()] == [1, 1, 1]


# -- TensorBoard --------------------------------------------------------------------


def curves(folder):
    """Tag -> step -> value, of all scalars."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = accumulator.EventAccumulator(str(folder)).Reload()

    return {
        tag: {e.step: e.tensor_proto.float_val[0] for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def test_scalars_by_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    monitor = mp.MixedPrecisionMonitor(log_dir=tmp_path)
    history = fit(half_classifier(), monitor).history
    found = curves(tmp_path)
    keys = {"loss_scale", "overflow_count", "overflow_total", "host_memory_mb"}
    for key in keys:
        values = found.pop(f"mixed_precision/{key}")
        assert values == pytest.approx(dict(enumerate(history[key]))), key
    assert found == {"mixed_precision/nonfinite_loss_count": {0: 1, 1: 1}}


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_scalars_by_batch(tmp_path, steps_per_execution):
    pytest.importorskip("tensorboard")
    if steps_per_execution > 1 and keras.backend.backend() == "torch":
        pytest.skip("torch has no steps_per_execution")
    monitor = mp.MixedPrecisionMonitor(log_dir=tmp_path, update_freq=2)
    model = half_classifier(steps_per_execution=steps_per_execution)
    fit(model, monitor)
    found = curves(tmp_path)
    # Five batches each, the second one skipped; read before the third and the fifth.
    assert found["mixed_precision/batch_loss_scale"] == {
        2: 2.0**14,
        4: 2.0**14,
        7: 2.0**13,
        9: 2.0**13,
    }
    totals = found["mixed_precision/batch_overflow_total"]
    assert totals == {2: 1, 4: 1, 7: 2, 9: 2}


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "batch", True, None])
def test_update_freq_is_checked(wrong):
    with pytest.raises(ValueError, match="must be 'epoch' or an integer >= 1. Rec"):
        mp.MixedPrecisionMonitor(update_freq=wrong)


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    for name in ("tensorboard", "tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    monitor = mp.MixedPrecisionMonitor(log_dir=tmp_path)
    with pytest.raises(ImportError, match=r"keras-mixprec\[tensorboard\]"):
        fit(half_classifier(), monitor, epochs=1)


# -- other people's callbacks -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("first", [True, False])
def test_weights_and_biases_receives_the_numbers(tmp_path, monkeypatch, first):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    from wandb.integration.keras import WandbMetricsLogger

    logged, monitor = [], mp.MixedPrecisionMonitor()
    with wandb.init(dir=str(tmp_path)) as run:
        log = run.log
        monkeypatch.setattr(wandb, "log", lambda row: logged.append(row) or log(row))
        callbacks = [monitor, WandbMetricsLogger()]
        history = fit_with(half_classifier(), callbacks if first else callbacks[::-1])
        summary = dict(run.summary)
    for key in ("loss_scale", "overflow_count", "overflow_total", "host_memory_mb"):
        assert [row[f"epoch/{key}"] for row in logged] == history[key]
        assert summary[f"epoch/{key}"] == history[key][-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("first", [True, False])
def test_mlflow_receives_the_numbers(tmp_path, monkeypatch, first):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.keras")
    monkeypatch.chdir(tmp_path)
    # A data base would take all of MLflow instead of its client.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    monitor = mp.MixedPrecisionMonitor()
    with mlflow.start_run() as run:
        callbacks = [monitor, mlflow.keras.MlflowCallback()]
        history = fit_with(half_classifier(), callbacks if first else callbacks[::-1])
        mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    for key in ("loss_scale", "overflow_count", "overflow_total", "host_memory_mb"):
        kept = client.get_metric_history(run.info.run_id, key)
        assert [(m.step, m.value) for m in kept] == list(enumerate(history[key]))


def fit_with(model, callbacks):
    return fit(model, callbacks[0], callbacks=callbacks[1:]).history
