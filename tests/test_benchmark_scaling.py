"""What surrounds the clock of benchmarks/scaling.py: processes, memory, the table."""

import itertools
import json
import pathlib
import sys
import time
import types

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def nothing():
    raise AssertionError("no turn was to be taken")


def run_job(monkeypatch, script, timeout=30, turn=nothing):
    """Run two processes of a script, which has its rank in `rank`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_job

    head = "import os, sys, time\nrank = os.environ['RANK']\n"
    command = [sys.executable, "-c", head + script]
    ranks = [{"RANK": "0"}, {"RANK": "1"}]
    return scaling_job.run(command, ranks, timeout, turn)


def test_all_processes_wait_for_one_turn_and_the_chief_is_heard(monkeypatch, tmp_path):
    late, turns = tmp_path / "late", []
    script = f"""
if rank == "1":
    time.sleep(1)
    open({str(late)!r}, "w").close()
print("ready", flush=True)
print("process", rank, "hears", sys.stdin.readline())
"""

    def turn():
        turns.append(late.exists())
        # Longer than the job's own time, which stands still.
        time.sleep(5)

    said = run_job(monkeypatch, script, timeout=5, turn=turn)
    assert turns == [True]
    assert [line.strip() for line in said if line.strip()] == ["process 0 hears go"]


def test_a_process_that_fails_ends_the_job_and_says_why(monkeypatch):
    # As NCCL does, the other waits for it longer than anybody would.
    script = "sys.exit('no such GPU') if rank == '1' else time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="process 1 failed") as raised:
        run_job(monkeypatch, script)
    assert time.monotonic() - start < 20
    assert "process 1, exit 1:\nno such GPU" in str(raised.value)
    assert "process 0, still ran" in str(raised.value)


def test_a_job_that_hangs_ends(monkeypatch):
    with pytest.raises(RuntimeError, match="no end after 2 s") as raised:
        run_job(monkeypatch, "rank == '1' and time.sleep(60)", timeout=2)
    assert "process 1, still ran" in str(raised.value)
    assert "process 0" not in str(raised.value)


@pytest.mark.parametrize(
    "before, visible",
    [(None, "0,1"), ("5,6,7", "5,6"), ("GPU-a", "GPU-a"), ("", "")],
)
def test_a_job_sees_as_many_gpus_as_it_has_devices(monkeypatch, before, visible):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    found = scaling._environment(rank=1, processes=2, port=1, devices=2)
    assert found["CUDA_VISIBLE_DEVICES"] == visible


def test_one_order_is_asked_of_tensorflow_alone(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    asked = []

    def run(command, environments, *others):
        asked.extend(env.get("TF_DETERMINISTIC_OPS") for env in environments)
        return ["{}"]

    monkeypatch.setattr(scaling.scaling_job, "run", run)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    for more in ([], ["--deterministic"]):
        scaling.launch(2, "mp", scaling.parse(more))
    assert asked == [None, "1"]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(SystemExit):
        scaling.parse(["--deterministic"])
    assert "TensorFlow's operations" in capsys.readouterr().err


@pytest.mark.parametrize("value, wanted", [(None, False), ("0", False), ("1", True)])
def test_a_row_says_in_which_order_it_ran(monkeypatch, value, wanted):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_worker

    monkeypatch.delenv("TF_DETERMINISTIC_OPS", raising=False)
    if value is not None:
        monkeypatch.setenv("TF_DETERMINISTIC_OPS", value)
    found = scaling_worker._is_deterministic()
    assert found == (wanted and keras.backend.backend() == "tensorflow")


def test_a_turn_is_one_rows(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    one = ["--wait-for-turn", "--devices", "2", "--scaling", "mp"]
    assert scaling.parse(one).wait_for_turn
    with pytest.raises(SystemExit):
        scaling.parse([*one, "none"])
    assert "--wait-for-turn is one row's" in capsys.readouterr().err


def test_the_presets_measure_every_engine_model_and_way_on_one_and_two(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import presets
    import scaling

    found = []
    for name in ("scaling", "scaling-resnet"):
        for backend, script, *arguments in presets.read_rows(name):
            monkeypatch.setenv("KERAS_BACKEND", backend)
            chosen = scaling.parse([*arguments, "--wait-for-turn"])
            assert (script, chosen.size, chosen.check) == ("scaling.py", "full", True)
            (devices,), (way,) = chosen.devices, chosen.scaling
            found.append((backend, chosen.model, way, devices, chosen.deterministic))
    # And once more where TensorFlow adds in one order.
    found.remove(("tensorflow", "bert", "mp", 2, True))
    assert len(found) == len({*found}) == 3 * 2 * 3 * 2
    # A lease may end before the last: ours and none of each engine on BERT first.
    assert {row[1:3] for row in found[:12]} == {("bert", "mp"), ("bert", "none")}


@pytest.mark.parametrize(
    "own, others, each",
    [
        # One process on two of three GPUs; the second of two, on one each.
        (slice(2), [], [10.0, 20.0]),
        (slice(1, 2), [7.0], [7.0, 20.0]),
    ],
)
def test_memory_is_of_the_jobs_devices_in_all_processes(monkeypatch, own, others, each):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_worker

    class Replicas:
        own_devices = own

        def over_processes(self, items):
            return [*others, *items]

    seen = {f"cuda:{i}": (1.0, 10.0 * (i + 1)) for i in range(3)}
    monkeypatch.setattr(scaling_worker.hardware, "gpu_memory", lambda: seen)
    assert scaling_worker._memory(Replicas()) == {
        "peak_memory_mb": sum(each),
        "memory_of": "device",
        "peak_memory_mb_each": each,
    }


def test_rows_of_two_devices_and_of_one_are_measured_in_turn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import run_matrix

    backend = keras.backend.backend()
    (tmp_path / "rows.txt").write_text(
        f"{backend} scaling.py --devices 2 --scaling mp --check\n"
        f"{backend} train_step.py --scaling mp\n"
    )
    command = ["run_matrix", "--rows", str(tmp_path / "rows.txt"), "--jobs", "2"]
    command += ["--out", str(tmp_path), "--together", "--"]
    small = ["--size", "small", "--model", "mlp", "--steps", "2", "--blocks", "2"]
    monkeypatch.setattr("sys.argv", command + small)
    waited, wait = [], run_matrix.Turns.wait

    def noted(self, row, alive):
        waited.append(row)
        wait(self, row, alive)

    monkeypatch.setattr(run_matrix.Turns, "wait", noted)
    code = run_matrix.main()
    failed = tmp_path / "rows.failed.txt"
    assert code == 0, failed.read_text()
    assert sorted(waited) == [0, 1]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    scaled, single = map(json.loads, lines)
    assert (scaled["benchmark"], single["benchmark"]) == ("scaling", "train_step")
    assert scaled["overflows_survived"] == "yes"
    assert scaled["copies_parted"] == ""
    assert scaled["xla"] == (backend == "jax")
    # Without GPUs it is each process's own, and torch has two.
    each = scaled["peak_memory_mb_each"]
    assert len(each) == (2 if backend == "torch" else 1) and min(each) > 0
    assert scaled["peak_memory_mb"] == pytest.approx(sum(each))
    assert scaled["together"] and single["together"]


def measured(way, devices, ms, **fields):
    row = {"benchmark": "scaling", "model": "bert", "size": "full", "batch": 64}
    row |= {"backend": "jax", "xla": True, "policy": "mixed_float16"}
    row |= {"scaling": way, "devices": devices, "together": True}
    row |= {"ms_per_step": ms, "ms_min": ms, "ms_max": ms}
    row |= {"blocks": 5, "steps_per_block": 10}
    row |= {"memory_of": "device", "peak_memory_mb_each": [1000.0] * devices}
    row |= {"overflows_survived": "yes" if way == "mp" else None}
    row |= {"device": "GPU", "date": "2026-01-01", "versions": {"keras": "3.15.1"}}
    return row | fields


def test_a_plot_has_a_line_for_each_way(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    from matplotlib.image import imread

    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    def launch(devices, way, options):
        return measured(way, devices, {"mp": 10.0, "none": 8.0}[way] + devices)

    drawn, save = [], figure.Figure.savefig

    def noted(self, *args, **options):
        drawn.append(self)
        return save(self, *args, **options)

    monkeypatch.setattr(scaling, "launch", launch)
    monkeypatch.setattr(figure.Figure, "savefig", noted)
    picture = tmp_path / "scaling.png"
    command = ["scaling", "--devices", "2", "1", "--scaling", "mp", "none"]
    monkeypatch.setattr("sys.argv", [*command, "--plot", str(picture)])
    scaling.main()
    # Colours, of which there are some besides black and white.
    pixels = imread(picture)[:, :, :3].reshape(-1, 3)
    assert (np.ptp(pixels, axis=1) > 0.5).any()
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"none": [[1, 9], [2, 10]], "mp": [[1, 11], [2, 12]]}
    assert axes.get_title() == "jax, bert, full, GPU"
    assert axes.get_ylim()[0] == 0


def test_the_rows_of_logical_devices_are_what_the_document_says(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report_benchmarks

    results = BENCHMARKS / "results"
    rows = report_benchmarks.read(results / "scaling-cpu")
    found = {(row["backend"], row["devices"], row["scaling"]) for row in rows}
    backends, ways = ("tensorflow", "jax", "torch"), ("none", "keras", "mp")
    assert found == {*itertools.product(backends, (1, 2, 4), ways)}
    assert len(rows) == len(found)
    for row in rows:
        assert row["memory_of"] == "host"
        assert row["copies_parted"] == ""
        assert row["overflows_survived"] == ("yes" if row["scaling"] == "mp" else None)
    # They are no figures of speed: the page that is generated has none of them.
    assert all(
        row["memory_of"] == "device"
        for row in report_benchmarks.read(results)
        if row["benchmark"] == "scaling"
    )


def test_the_table_of_several_gpus(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report_benchmarks

    rows = [measured("mp", 2, 12.5, copies_parted="")]
    rows += [measured("none", 2, 12.0, copies_parted="w by 0.5")]
    rows += [measured("mp", 1, 10.0), measured("none", 1, 9.75)]
    # Of another engine there is nothing to compare with.
    rows += [measured("mp", 2, 50.0, backend="torch", xla=False)]
    page = report_benchmarks.page(rows)
    assert page.count("### ") == 2
    times, agreed = page.split("### Several GPUs: what agreeing costs")
    memory, ours, when = "1000, 1000", "keras_mixprec", "5 x 10, 2026-01-01"
    assert cells_of(times) == [
        ["1", "no loss scaling", "9.75 (9.75 to 9.75)", "", "", "1000", when, "", ""],
        ["1", ours, "10.00 (10.00 to 10.00)", "", "+2.6%", "1000", when, "yes", ""],
        # 9.75 / 12.
        ["2", "no loss scaling", "12.00 (12.00 to 12.00)", "81.2%", "", memory, when]
        + ["", "w by 0.5"],
        ["2", ours, "12.50 (12.50 to 12.50)", "80.0%", "+4.2%", memory, when, "yes"]
        + ["no"],
        ["2", ours, "50.00 (50.00 to 50.00)", "", "", memory, when, "yes", ""],
    ]
    # 3.6 + 2 * 0.47 us are 4.54; 12.5 - 12 - (10 - 9.75) ms, of 12.5.
    assert cells_of(agreed) == [["2", ours, "4.5 us (0.04%)", "+250 us (+2.00%)"]]


def cells_of(page):
    lines = [line for line in page.splitlines() if line.startswith("| BERT-base, 64")]
    return [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines]


def test_a_run_past_midnight_is_one_and_another_order_is_compared_apart(
    monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report_benchmarks

    tensorflow = {"backend": "tensorflow", "xla": False, "run": "2026-01-01"}
    rows = [measured("mp", 1, 10.0, **tensorflow)]
    rows += [measured("mp", 2, 20.0, date="2026-01-02", **tensorflow)]
    rows += [measured("mp", 2, 50.0, deterministic=True, **tensorflow)]
    # Another run of another day, in the same file.
    other = {"run": None, "date": "2026-01-09", "backend": "jax", "xla": True}
    rows += [measured("mp", 1, 10.0, **other)]
    (tmp_path / "night.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = report_benchmarks.page(report_benchmarks.read(tmp_path))
    assert page.count("\n## ") == 2 and "## GPU, 2026-01-09\n" in page
    assert "## GPU, 2026-01-01 and 2026-01-02\n" in page
    page = page[: page.index("## GPU, 2026-01-09")]
    lines = [line for line in page.splitlines() if line.startswith("| BERT-base")]
    backends = [line.split("|")[2].strip() for line in lines]
    plain, deterministic = "tensorflow, no XLA", "tensorflow, no XLA, deterministic"
    assert backends == [plain, plain, deterministic]
    # Efficiency: of 10 ms on one GPU.
    assert [cells[3] for cells in cells_of(page)] == ["", "50.0%", ""]


@pytest.mark.parametrize(
    "copies, wrong",
    [
        ([[1.0, -0.0], [1.0, -0.0]], ""),
        ([[1.0, 2.0], [1.0, 2.5]], "differs by 0.5"),
        ([[1.0, 2.0], [1.0, float("nan")]], "is not finite"),
        # The same bits on all, and still wrong.
        ([[float("inf")], [float("inf")]], "is not finite"),
        ([[0.0], [-0.0]], "differs by inf"),
        ([[1.0]], ""),
    ],
)
def test_what_is_wrong_with_copies_is_said(monkeypatch, copies, wrong):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_worker

    assert scaling_worker._apart([np.array(c) for c in copies]) == wrong


@pytest.mark.parametrize(
    "after, wrong",
    [
        # Apart as before: no part of the skipped step.
        ([1.0, 2.0], ""),
        ([1.0, 1.0], "changed on device 1"),
        ([2.0, 2.0], "changed on device 0"),
        ([1.0, float("inf")], "is not finite"),
    ],
)
def test_a_step_that_is_skipped_leaves_each_copy_as_it_was(monkeypatch, after, wrong):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_worker

    before, after = ([np.array([c]) for c in copies] for copies in ([1.0, 2.0], after))
    assert scaling_worker._changed(before, after) == wrong


def test_the_weight_that_has_parted_most_is_named(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling_worker

    class Replicas:
        def copies(self, variable):
            return copies[variable.path]

    def named(path):
        return types.SimpleNamespace(path=path)

    model = types.SimpleNamespace(trainable_variables=[named("a"), named("b")])
    copies = {"a": [np.ones(2), np.ones(2)], "b": [np.ones(2), np.ones(2)]}
    assert scaling_worker._parted(Replicas(), model) == ""
    copies = {"a": [np.zeros(2), np.array([0.0, 0.5])], "b": [np.ones(2), np.zeros(2)]}
    assert scaling_worker._parted(Replicas(), model) == "b by 1"


def test_a_later_run_on_as_many_gpus_replaces_the_earlier(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report_benchmarks

    later = measured("mp", 2, 11.0, peak_memory_mb_each=[9.0, 9.0], together=False)
    later["overflows_survived"] = "no: counted 2 times"
    rows = [measured("mp", 2, 12.5), measured("mp", 1, 10.0), later]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = report_benchmarks.read(tmp_path)
    assert [(row["devices"], row["ms_per_step"]) for row in kept] == [(2, 11), (1, 10)]
