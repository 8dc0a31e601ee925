"""`report`: what it reads, what it says, and the page it writes."""

import html.parser
import json
import math
import re
import sys
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import keras_mixprec as mp
from keras_mixprec.reporting.charts import charts
from keras_mixprec.reporting.page import report
from keras_mixprec.reporting.runs import Run
from keras_mixprec.reporting.runs import read_runs
from keras_mixprec.reporting.theme import LIGHT
from keras_mixprec.reporting.verdict import format_scale
from keras_mixprec.reporting.verdict import judge

SCALED = {
    "loss": [2.0, 1.0, 0.5, 0.25],
    "loss_scale": [2.0**14, 2.0**15, 2.0**15, 2.0**16],
    "overflow_count": [2, 0, 1, 0],
    "overflow_total": [2, 2, 3, 3],
    "host_memory_mb": [800.0, 801.0, 802.0, 803.0],
}


def run(label="run", steps=None, **logs):
    return Run(label, {k: dict(enumerate(v, 1)) for k, v in logs.items()}, steps)


def drawn(runs):
    """Chart name -> the axes it is drawn into."""
    from matplotlib.figure import Figure

    axes = {}
    for chart in charts(runs):
        axes[chart.name] = Figure().subplots()
        chart.draw(axes[chart.name], LIGHT)
    return axes


# -- what is read ---------------------------------------------------------------------


def test_reads_a_history():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(mp.LossScaleOptimizer("sgd", 4.0), "mse")
    history = model.fit(
        np.zeros((6, 2)),
        np.zeros((6, 1)),
        batch_size=2,
        initial_epoch=3,
        epochs=5,
        verbose=0,
        callbacks=[mp.MixedPrecisionMonitor()],
    )
    (read,) = read_runs(history)
    assert read.steps_per_epoch == 3
    assert read.logs["loss_scale"] == {4: 4.0, 5: 4.0}
    assert [r.label for r in read_runs({"a": history, "b": history.history})] == [
        "a",
        "b",
    ]


def test_validation_every_second_epoch_is_drawn_there():
    (read,) = read_runs({"loss": [4.0, 3.0, 2.0, 1.0, 0.5], "val_loss": [3.5, 1.5]})
    assert read.logs["val_loss"] == {2: 3.5, 4: 1.5}


def test_reads_the_file_of_csv_logger(tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "first.csv", separator=";")
    logger.set_model(SimpleNamespace(stop_training=True))
    logger.on_train_begin()
    logger.on_epoch_end(0, {"loss": 1.5, "loss_scale": 2.0**15, "val_loss": 2.0})
    logger.on_epoch_end(1, {"loss": math.inf, "loss_scale": 2.0**14})
    logger.on_train_end()
    (read,) = read_runs(tmp_path)
    assert read.label == "first"
    assert read.logs["loss"] == {1: 1.5, 2: math.inf}
    assert read.logs["val_loss"] == {1: 2.0}


def test_reads_json_lines_and_the_last_attempt_at_an_epoch(tmp_path):
    rows = [
        {"epoch": 0, "loss": 2.0},
        {"epoch": 1, "loss": 9.0},
        {"epoch": 1, "loss": 1},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "a.jsonl").write_text('{"loss": 3.0}\n\n{"loss": 2.5}\n')
    a, b = read_runs(str(tmp_path))
    assert (a.label, a.logs) == ("a", {"loss": {1: 3.0, 2: 2.5}})
    assert (b.label, b.logs) == ("b", {"loss": {1: 2.0, 2: 1.0}})


@pytest.mark.parametrize("wrong", [7, None, [1.0], {"a": 3}, keras.Sequential()])
def test_what_is_no_run_raises(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"must be a `History`.*Received: run="):
        report(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("empty", [{}, {"a": {}}, {"loss": []}])
def test_no_epoch_raises(empty):
    with pytest.raises(ValueError, match="holds no epoch"):
        read_runs(empty)


def test_a_folder_without_logs_raises(tmp_path):
    with pytest.raises(ValueError, match="without any"):
        read_runs(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        read_runs(tmp_path / "absent")


# -- what is said ---------------------------------------------------------------------


def test_scales_are_named_by_their_power():
    assert format_scale(2.0**15) == "32,768 (2^15)"
    assert format_scale(2.0**-3) == "2^-3"
    assert [format_scale(s) for s in (0.0, math.inf)] == ["0.0", "inf"]


def test_overflows_of_a_sound_run():
    (verdict,) = judge([run(steps=50, **SCALED)])
    assert verdict.level == "good"
    assert "3 steps overflowed and were skipped (1.5% of 200)" in verdict.text
    assert "the last in epoch 3" in verdict.text
    assert "65,536 (2^16)" in verdict.text


def test_a_run_without_overflows():
    (verdict,) = judge([run(loss=[1.0], loss_scale=[8.0], overflow_count=[0])])
    assert (verdict.level, verdict.text) == (
        "good",
        "run: no step overflowed; the loss scale ended at 8 (2^3).",
    )


@pytest.mark.parametrize(
    ("level", "words", "logs"),
    [
        ("bad", "loss of the last epoch is nan", {"loss": [1.0, math.nan]}),
        ("info", "no loss scale was logged", {"loss": [1.0]}),
        ("info", "were not counted", {"loss_scale": [32.0]}),
        ("warning", "outside 1 to", {"loss_scale": [0.25], "overflow_count": [1]}),
        ("warning", "outside 1 to", {"loss_scale": [0.0]}),
        ("warning", "outside 1 to", {"loss_scale": [math.nan]}),
        ("warning", "30% of", {"loss_scale": [8.0] * 2, "overflow_count": [0, 3]}),
    ],
)
def test_verdicts(level, words, logs):
    (verdict,) = judge([run(steps=10, **logs)])
    assert verdict.level == level
    assert words in verdict.text


def test_a_search_for_the_scale_in_the_first_half_is_sound():
    (verdict,) = judge([run(steps=10, loss_scale=[8.0] * 2, overflow_count=[9, 0])])
    assert verdict.level == "good"


def test_runs_are_compared_by_validation_accuracy():
    runs = [run("a", accuracy=[1.0], val_accuracy=[0.975])]
    near = [*runs, run("b", accuracy=[0.5], val_accuracy=[0.98])]
    far = [*runs, run("b", accuracy=[1.0], val_accuracy=[0.95])]
    assert judge(near)[0].level == "good"
    assert "a 97.50%, b 98.00%; 0.50 points apart" in judge(near)[0].text
    assert judge(far)[0].level == "warning"


# -- what is drawn --------------------------------------------------------------------


def test_charts_only_of_what_was_logged():
    assert list(drawn([run(**SCALED)])) == ["loss", "loss_scale", "overflows", "memory"]
    assert list(drawn([run(loss=[1.0])])) == ["loss"]
    assert charts([run(accuracy=[1.0])]) == []


def test_curves_hold_the_logs():
    axes = drawn([run(**SCALED)])
    line, marks = axes["loss_scale"].lines
    assert list(line.get_xdata()) == [1, 2, 3, 4]
    assert list(line.get_ydata()) == SCALED["loss_scale"]
    assert axes["loss_scale"].get_yaxis().get_transform().base == 2
    # Crossed out: the first and the third epoch.
    assert list(marks.get_xdata()) == [1, 3]
    assert list(marks.get_ydata()) == [2.0**14, 2.0**15]
    assert [bar.get_height() for bar in axes["overflows"].patches] == [2, 0, 1, 0]
    assert list(axes["memory"].lines[0].get_ydata()) == SCALED["host_memory_mb"]


def test_plan_changes_of_adaptive_precision_are_drawn():
    logs = {"float32_layers": [1, 2, 2, 1], "precision_changes": [0, 1, 0, 1]}
    axes = drawn([run(loss=[1.0] * 4, **logs), run("b", loss=[1.0])])
    assert list(axes) == ["loss", "plan"]
    layers, changes = axes["plan"].lines[:2]
    assert list(layers.get_xdata()) == [1, 2, 3, 4]
    assert list(layers.get_ydata()) == [1, 2, 2, 1]
    assert list(changes.get_xdata()) == [2, 4]
    assert list(changes.get_ydata()) == [2, 1]


def test_gpu_memory_is_preferred():
    logs = {**SCALED, "gpu_memory_peak_mb": [1.0, 2.0, 3.0, 4.0]}
    (line,) = drawn([run(**logs)])["memory"].lines
    assert list(line.get_ydata()) == [1, 2, 3, 4]


def test_several_optimizers_are_drawn_apart():
    logs = {"d_optimizer_loss_scale": [8.0], "g_optimizer_loss_scale": [4.0]}
    legend = drawn([run("gan", **logs)])["loss_scale"].get_legend()
    names = [text.get_text() for text in legend.texts]
    assert names == ["gan, d_optimizer", "gan, g_optimizer"]


# -- what is written ------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Collects what a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        keys = ("src", "srcset", "href", "data", "action")
        self.found += [value for key, value in attrs if key in keys]


def test_the_page_loads_nothing(tmp_path):
    page = report({"a": SCALED, "b": SCALED}, tmp_path / "new" / "out", title="T & U")
    text = page.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert len(links.found) == 8
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert not re.search(r"@import|url\(|<script", text)
    assert "<title>T &amp; U</title>" in text
    assert "prefers-color-scheme: dark" in text


def test_files(tmp_path):
    page = report(SCALED, tmp_path)
    pictures = [
        "curves.png",
        "loss.png",
        "loss_scale.png",
        "memory.png",
        "overflows.png",
    ]
    assert page == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == [*pictures, "report.html"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_a_run_folder_gets_its_report(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,loss_scale\n0,1.0,8.0\n")
    assert report(tmp_path) == tmp_path / "report.html"


def test_labels_are_text_not_markup(tmp_path):
    text = report({"<b>x</b>": SCALED}, tmp_path).read_text()
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text


@pytest.mark.parametrize(
    "logs",
    [
        {"loss": [math.nan] * 3, "loss_scale": [0.0] * 3, "overflow_count": [5] * 3},
        {"loss": [math.inf], "loss_scale": [math.inf]},
        {"loss": [1e-9, -3.0], "loss_scale": [2.0**-14, 2.0**24]},
        {"accuracy": [1.0]},
        {"loss": [float(i + 1) for i in range(300)], "overflow_count": [1] * 300},
    ],
)
def test_extremes_are_drawn_without_a_warning(logs, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report({"run " * 30: logs}, tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_before_anything_is_written(
    missing, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"'{missing}'.*keras-mixprec\[report\]"):
        report(SCALED, tmp_path / "out")
    assert not (tmp_path / "out").exists()
