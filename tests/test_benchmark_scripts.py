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
        ]
    )
    line = next(x for x in page.splitlines() if "keras_mixprec |" in x)
    assert "tensorflow, XLA" in line
    assert "+5.0%" in line and "+1.0%" in line and "6.00x" in line
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
