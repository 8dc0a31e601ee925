"""What surrounds the timing in benchmarks/: the runner and the page."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def measured(**fields):
    row = {"benchmark": "train_step", "model": "bert", "size": "full", "xla": True}
    row |= {"backend": "tensorflow", "scaling": "none", "policy": "mixed_float16"}
    row |= {"batch": 64, "ms_per_step": 10.0, "ms_min": 9.0, "ms_max": 11.0}
    row |= {"blocks": 5, "steps_per_block": 10, "samples_per_s": 6400.0}
    row |= {"peak_memory_mb": 100.0, "memory_of": "device", "compile_s": 80.0}
    row |= {"device": "GPU", "date": "2026-01-01", "versions": {"keras": "3.15.1"}}
    return row | fields


def test_the_page_compares_rows_that_differ_in_one_thing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report_benchmarks

    page = report_benchmarks.page(
        [
            measured(),
            measured(scaling="mp", ms_per_step=10.5, peak_memory_mb=101.0),
            measured(policy="float32", ms_per_step=63.0),
            measured(backend="jax", scaling="mp", ms_per_step=1.0),
            measured(activations="float32", ms_per_step=7.0),
            measured(activations="float32", scaling="mp", ms_per_step=7.7),
        ]
    )
    line = next(x for x in page.splitlines() if "keras_mixprec |" in x)
    assert "tensorflow, XLA" in line
    assert "+5.0%" in line and "+1.0%" in line and "6.00x" in line
    in_float32 = [x for x in page.splitlines() if "float32 activations" in x]
    assert "+10.0%" in in_float32[1] and "8.18x" in in_float32[1]
    # Another backend's rows are no reference.
    assert "%" not in next(x for x in page.splitlines() if x.startswith("| jax"))


def test_a_later_run_replaces_an_earlier_one(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report_benchmarks

    rows = [measured(), measured(ms_per_step=8.0, date="2026-01-02"), measured(xla=0)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    kept = report_benchmarks.read(tmp_path)
    assert [(row["ms_per_step"], row["xla"]) for row in kept] == [
        (8.0, True),
        (10.0, 0),
    ]
    (tmp_path / "rows.jsonl").write_text('{"half": ')
    with pytest.raises(ValueError, match="line 1 of rows.jsonl"):
        report_benchmarks.read(tmp_path)


def test_the_page_shows_what_looking_at_a_step_costs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import inspector_overhead
    import report_benchmarks

    # Plain and looked at in turns: a drift hits both, and the ratios do not see it.
    found = inspector_overhead.ratios([1.0, 1.25, 2.0, 2.25, 4.0, 6.0], steps=10)
    assert found["ms_plain"] == 200 and found["ms_looked_at"] == 225
    assert found["paired_ratio"] == 1.25
    assert (found["ratio_min"], found["ratio_max"]) == (1.125, 1.5)
    row = measured(benchmark="inspector") | found
    line = report_benchmarks.page([measured(), row]).splitlines()[-1]
    assert "| 200.00 | 225.00 | +25.0% | +12.5%, +50.0% | 3 x 10 |" in line


def test_rows_of_other_backends_are_left_out(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import run_matrix

    script, rows = tmp_path / "script.py", tmp_path / "rows.txt"
    script.write_text("import os; print('{\"' + os.environ['KERAS_BACKEND'] + '\"')")
    rows.write_text("".join(f"{b} {script}\n" for b in run_matrix.BACKENDS))
    arguments = ["run_matrix", "--rows", str(rows), "--backends", "jax", "torch"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "out")])
    assert run_matrix.main() == 0
    found = (tmp_path / "out" / "rows.jsonl").read_text().split()
    assert found == ['{"jax"', '{"torch"']


def test_a_failing_row_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import run_matrix

    for name in run_matrix.PRESETS:
        for _, script, *_ in run_matrix.read_rows(name):
            assert (BENCHMARKS / script).is_file()
    script = tmp_path / "script.py"
    script.write_text("import sys; print('{}'); sys.exit(int(sys.argv[1]))")
    rows = tmp_path / "rows.txt"
    rows.write_text(f"jax {script} 3  # fails\n\njax {script} 0\n")
    arguments = ["run_matrix", "--rows", str(rows), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    assert run_matrix.main() == 1
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{}\n{}\n"
    assert "exit 3" in (tmp_path / "out" / "rows.failed.txt").read_text()
    with pytest.raises(ValueError, match="takes a file or one of"):
        run_matrix.read_rows("nothing")


def test_rows_side_by_side_are_written_as_they_come(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import run_matrix

    script = tmp_path / "script.py"
    # Each waits for the other's file; the last one for nothing that ever comes.
    script.write_text(
        "import pathlib, sys, time\n"
        "here, mine, other = map(pathlib.Path, sys.argv[:3])\n"
        "mine.touch(); print('{}', flush=True)\n"
        "while not other.exists(): time.sleep(0.01)\n"
    )
    a, b, c = (tmp_path / name for name in "abc")
    rows = tmp_path / "rows.txt"
    rows.write_text(
        f"jax {script} {a} {b}\njax {script} {b} {a}\njax {script} {a} {c}\n"
    )
    arguments = ["run_matrix", "--rows", str(rows), "--out", str(tmp_path / "out")]
    arguments += ["--jobs", "2", "--timeout", "10"]
    monkeypatch.setattr("sys.argv", arguments)
    assert run_matrix.main() == 1
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{}\n" * 3
    failed = (tmp_path / "out" / "rows.failed.txt").read_text()
    assert failed.count("timeout after 10 s") == 1


def trained(seed, accuracy, policy="mixed_float16", **fields):
    row = {"benchmark": "trainings", "task": "cnn", "backend": "jax", "epochs": 9}
    row |= {"policy": policy, "adaptive": False, "seed": seed, "accuracy": accuracy}
    row |= {"device": "GPU", "date": "2026-01-01", "versions": {"keras": "3.15.1"}}
    return row | fields


def test_the_table_of_trainings_says_what_is_too_far_apart(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from report_trainings import page

    exact = [trained(seed, 0.9, "float32") for seed in range(3)]
    near = [trained(seed, 0.896 + seed / 1e3) for seed in range(3)]
    found = page(exact + near)
    assert "1 of 9 pairs over at least 3 seeds; 1 of them within" in found
    assert "89.60, 89.70, 89.80 | 89.70 | 0.20 | -0.30 |" in found
    assert "**" not in found
    far = [trained(seed, 0.8939 + seed / 1e3) for seed in range(3)]
    found = page(exact + far)
    assert "1 of 9 pairs over at least 3 seeds; 0 of them within" in found
    assert "**More than 0.5 points apart:** cnn on JAX -0.51." in found
    assert "| **-0.51** |" in found
    # Two seeds prove nothing, and means are over the same seeds.
    found = page(exact + [trained(1, 0.9), trained(2, 0.9)])
    assert "0 of 9 pairs" in found
    assert "**Seeds missing** (there are): cnn on JAX: 2." in found


def test_the_table_of_trainings_says_which_plans_changed_late(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from report_trainings import page

    calm = trained(0, 0.9, adaptive=True, changes=[[6, "dense", "float32"]])
    found = page([calm])
    assert "1 of 9 adaptive runs; 1 of them without a change in their" in found
    assert "epoch 6: dense float32" in found
    late = trained(0, 0.9, adaptive=True, changes=[[7, "dense", "float32"]])
    found = page([late])
    assert "1 of 9 adaptive runs; 0 of them without a change in their" in found
    assert "**Changed in the last third:** cnn on JAX." in found


def test_pairs_of_all_devices_are_counted_together_each_on_one(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from report_trainings import page

    def three(policy, **place):
        return [trained(s, 0.9 + s / 1e3, policy, **place) for s in range(3)]

    other = {"device": "CPU", "backend": "torch", "versions": {"cuda": "cuda 13000"}}
    rows = [*three("float32"), *three("mixed_float16")]
    rows += [*three("float32", **other), *three("mixed_float16", **other)]
    # Of a pair that one device has whole, another's part says nothing.
    found = page([*rows, trained(0, 0.1, "float32", device="CPU")])
    assert found.count(" of 9 pairs") == 1
    assert "2 of 9 pairs over at least 3 seeds; 2 of them within" in found
    assert "Seeds missing" not in found
    assert "| torch | CPU | +0.00 | 0.20 | 0.20 |" in found
    assert "\ncuda 13000, keras 3.15.1.\n" in found
    # Halves of two devices are no pair.
    apart = [*three("float32"), *three("mixed_float16", device="CPU")]
    assert "0 of 9 pairs" in page(apart)


def test_the_page_of_trainings_shows_a_fault_that_comes_and_goes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from report_trainings import page

    fault = {"benchmark": "passing_fault", "task": "hot attention", "fault": [2, 3]}
    changes = [[3, "attention", "float32"], [6, "attention", "mixed_float16"]]
    fault |= {"adaptive": True, "skipped": 58}
    rows = [trained(s, 0.9 + s / 100, changes=changes, **fault) for s in range(2)]
    found = page(rows)
    assert "0 of 9 pairs" in found and "0 of 9 adaptive runs" in found
    assert "goes: 2; 2 changed their plan, 2 had no change in their last" in found
    assert "epochs 2 to\n3 of 9" in found
    line = "| JAX | mixed_float16, adaptive | 90.00, 91.00 | 90.50 | 58, 58 | epoch 3: "
    assert line in found
    late = trained(2, 0.9, changes=[[7, "attention", "float32"]], **fault)
    assert "goes: 3; 3 changed their plan, 2 had no change" in page([*rows, late])
