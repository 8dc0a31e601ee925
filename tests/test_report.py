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
from keras_mixprec.attribution import Attribution
from keras_mixprec.precision_plan import LayerPlan
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.reporting.charts import charts
from keras_mixprec.reporting.charts import draw_all
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


def trained(tmp_path=None, scale=4.0, bad=()):
    """A model of two layers, trained for two epochs of three steps."""
    dense = keras.layers.Dense
    with mp.policy_scope("mixed_float16"):
        layers = [dense(2, name="first"), dense(1, name="last")]
        model = keras.Sequential([keras.Input((2,)), *layers])
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(0.0), scale), "mse")
    path = tmp_path and tmp_path / "half.jsonl"
    x = np.ones((6, 2), "float32")
    x[list(bad)] = 1e6
    monitor = mp.MixedPrecisionMonitor(json_lines=path)
    fit = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
    return model.fit(x, np.zeros((6, 1)), callbacks=[monitor], **fit)


def test_a_history_brings_its_plan_and_where_overflows_began():
    (read,) = read_runs(trained(bad=[2]))
    assert {row.path: row.policy for row in read.plan}["first"] == "mixed_float16"
    assert [(e, w.nonfinite_loss) for e, w in read.overflows.items()] == [
        (1, 1),
        (2, 1),
    ]
    assert read.all_overflows.steps == 2


def test_a_folder_brings_the_same(tmp_path):
    history = trained(tmp_path, bad=[2])
    (read,), (expected,) = read_runs(tmp_path), read_runs(history)
    assert read.overflows == expected.overflows
    assert read.plan == expected.plan
    for key, values in expected.logs.items():
        assert read.logs[key] == pytest.approx(values), key


def test_of_an_epoch_run_again_the_last_attempt_counts(tmp_path):
    where = {"began": {"a": 1}, "spread": {"a": 1}, "nonfinite_loss": 0}
    rows = [{"epoch": e, "loss": 1.0, "overflows": where} for e in (0, 1)]
    rows.append({"epoch": 1, "loss": "NaN"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (read,) = read_runs(tmp_path)
    assert list(read.overflows) == [1]
    assert math.isnan(read.last("loss"))


def test_a_float32_model_has_no_plan_to_show():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    (read,) = read_runs(model.fit(np.zeros((2, 2)), np.zeros((2, 1)), verbose=0))
    assert read.plan is None


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


def blamed(nonfinite_loss=0, epoch=1, **began):
    """The sound run, its overflows put down to layers or to the loss."""
    where = Attribution(began, began, nonfinite_loss)
    logs = {k: dict(enumerate(v, 1)) for k, v in SCALED.items()}
    return Run("run", logs, 50, {epoch: where})


def test_the_layer_is_named():
    good, info = judge([blamed(head=1, trunk=2)])
    assert (good.level, info.level) == ("good", "info")
    assert "loss scaling at work" in good.text
    assert "the loss itself was finite" in info.text
    assert "nearest the loss first, in 'head' (1), 'trunk' (2)" in info.text


@pytest.mark.parametrize(("epoch", "level"), [(2, "info"), (3, "warning")])
def test_a_loss_that_is_not_finite_is_no_loss_scaling_at_work(epoch, level):
    good, said = judge([blamed(nonfinite_loss=3, epoch=epoch)])
    assert "loss scaling at work" not in good.text
    # Early it may be a bad start; what is still there later stays.
    assert said.level == level
    assert "in all of them the loss itself was not finite" in said.text


def test_lost_steps_come_with_a_remedy():
    logs = {"loss_scale": {1: 8.0, 2: 8.0}, "overflow_count": {1: 0, 2: 3}}
    where = {2: Attribution({"trunk": 2, "stem": 1}, {}, 0)}
    lost, said = judge([Run("run", logs, 10, where)])
    assert lost.level == said.level == "warning"
    assert "keep_float32=['trunk']" in lost.text


def test_memory_against_the_float32_run():
    def peak(label, *values, **logs):
        return run(label, gpu_memory_peak_mb=list(values), **logs)

    full = peak("float32", 1000.0, 900.0)
    half = peak("half", 700.0, 710.0, loss_scale=[8.0, 8.0])
    brain = peak("mixed_bfloat16", 1200.0)
    (said, *_) = judge([half, full])
    assert said.level == "good"
    assert said.text == "Peak GPU memory: float32 1,000 MiB, half 710 MiB (-29%)."
    (said, *_) = judge([half, full, brain])
    assert said.level == "info"
    assert "mixed_bfloat16 1,200 MiB (+20%)" in said.text
    # Which of them is the float32 run, if any, nobody can tell.
    for unknown in ([half, brain], [half, peak("a", 1.0), peak("b", 1.0)], [full]):
        assert not any("Peak" in verdict.text for verdict in judge(unknown))


@pytest.mark.parametrize(("share", "level"), [(57.0, "good"), (3.7, "warning")])
def test_tensor_cores_of_a_run_in_half_precision(share, level):
    logs = {"loss": {1: 1.0}, "tensor_core_util": {1: share}}
    half = Run("half", logs, plan=PrecisionPlan("mixed_float16", []))
    said = judge([half])[-1]
    assert said.level == level
    assert f"busy {share:.0f}%" in said.text
    assert len(judge([Run("full", logs)])) == 1


# -- what is drawn --------------------------------------------------------------------


def test_where_overflows_began_is_drawn():
    axes = drawn([blamed(nonfinite_loss=2, head=1, trunk=4)])["overflow_layers"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["the loss itself", "head", "trunk"]
    assert [bar.get_width() for bar in axes.patches] == [2, 1, 4]


def test_the_loss_is_the_first_row_whichever_run_lost_steps_to_it():
    runs = [blamed(head=1), blamed(nonfinite_loss=1, trunk=1)]
    labels = drawn(runs)["overflow_layers"].get_yticklabels()
    names = [label.get_text() for label in labels]
    assert names == ["the loss itself", "head", "trunk"]


def test_many_layers_and_runs_are_drawn():
    deep = {f"encoder_layer_{i}/self_attention/queries": i + 1 for i in range(20)}
    runs = [blamed(nonfinite_loss=1, **deep), blamed(head=30), run(**SCALED)]
    axes = drawn(runs)["overflow_layers"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[-1] == "15 others" and "head" in names
    assert "…19/self_attention/queries" in names
    assert len(names) == len(set(names)) == 8
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == 1 + sum(deep.values()) + 30


def test_tensor_cores_are_drawn_where_they_were_logged():
    axes = drawn([run(tensor_core_util=[50.0], gpu_util=[90.0])])["tensor_cores"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[50], [90]]


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


@pytest.mark.parametrize("layers", [2, 40])
def test_the_plan_is_a_table(tmp_path, layers):
    rows = [
        LayerPlan(f"layer_{i}", "Dense", "mixed_float16", "<because>")
        for i in range(layers)
    ]
    PrecisionPlan("mixed_float16", rows).to_json(tmp_path / "a.plan.json")
    (tmp_path / "a.jsonl").write_text('{"epoch": 0, "loss": 1.0}')
    text = report(tmp_path).read_text()
    assert text.count("<td>mixed_float16</td><td>&lt;because&gt;</td>") == layers
    assert f"{layers} layers: {layers} mixed_float16" in text
    # A long one is folded up.
    assert ('<details class="table plan" open>' in text) == (layers == 2)


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


def test_an_odd_number_of_charts_leaves_no_empty_one_in_the_picture(monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    found = charts(
        read_runs({"loss": [2.0], "loss_scale": [4.0], "overflow_count": [0]})
    )
    assert len(found) % 2 == 1
    draw_all(found)
    assert sum(ax.axison for ax in figures[0].axes) == len(found)
