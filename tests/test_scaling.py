"""The latency model by hand, and that the document says what it computes."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import collectives  # noqa: E402
import scaling  # noqa: E402


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "replicas, expected",
    [
        # Ring in one host: 3.6 + 2 * 1 * 0.47, and 3.6 + 2 * 7 * 0.47.
        (2, 4.54),
        (8, 10.18),
        # Tree of 8 hosts: 4.4 + 2 * (7 * 0.52 * 1.8 + 3 * 5).
        (64, 47.504),
    ],
)
def test_an_all_reduce_of_a_scalar(replicas, expected):
    assert collectives.scalar_all_reduce(replicas) == pytest.approx(expected)


@pytest.mark.parametrize(
    "replicas, expected",
    # 6.6 + 2 * 7 * 0.6; 6.8 + 2 * (7 * 0.6 + 3 * 5), no hop slower than in one host.
    [(2, 7.8), (8, 15.0), (64, 45.2)],
)
def test_an_all_reduce_by_later_figures(replicas, expected):
    found = collectives.scalar_all_reduce(replicas, collectives.LATER)
    assert found == pytest.approx(expected)


def test_processes_of_one_host_are_a_ring_however_many():
    links = collectives.loopback(base=10.0, hop=3.0)
    # 10 + 2 (n - 1) 3, also where NCCL's figures would see several hosts.
    found = [collectives.scalar_all_reduce(n, links) for n in (1, 2, 8, 64)]
    assert found == [10.0, 16.0, 52.0, 388.0]


def test_a_call_lasts_from_the_last_that_calls_to_the_last_served():
    starts, ends = [[0.0, 10.0], [2.0, 10.0]], [[3.0, 12.0], [7.0, 11.0]]
    assert collectives.spans(starts, ends) == [5.0, 2.0]


def test_no_prediction_looks_at_what_it_is_held_against(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    # Of one process the base; of two the hop, half of a round trip.
    scalars = {1: [9.0, 30.0, 10.0], 2: [1.0, 2.0, 90.0], 4: [40.0, 50.0, 25.0]}
    measured = {n: iter(values) for n, values in scalars.items()}

    def measure(processes, elements, repeats):
        ways = ("scalar", "gradients", "gradients_then_scalar", "gradients_and_scalar")
        found = dict.fromkeys(ways, 1000.0) | {"round_trip_quarter": 6.0}
        found |= {f"{way}_queued": 100.0 * processes for way in ways}
        return found | {"scalar_quarter": next(measured[processes])}

    monkeypatch.setattr(collectives, "measure", measure)
    collectives.compare([2, 4], 8, 50, 3, str(tmp_path / "rows.jsonl"))
    rows = read(tmp_path / "rows.jsonl")
    assert [(row["base"], row["hop"]) for row in rows] == [(10.0, 3.0)] * 2
    assert [row["predicted_scalar"] for row in rows] == [16.0, 28.0]
    assert [row["scalar_quarter"] for row in rows] == [2.0, 40.0]
    assert [row["residual_scalar"] for row in rows] == [-14.0, 12.0]
    spread = ("scalar_quarter_min", "scalar_quarter_max")
    assert [[row[name] for name in spread] for row in rows] == [[1, 90], [25, 50]]
    queued = ("alone_queued", "scalar_queued")
    assert [[row[name] for name in queued] for row in rows] == [[100, 200], [100, 400]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_local_processes_are_measured(processes):
    pytest.importorskip("torch")
    found = collectives.measure(processes, elements=8, repeats=4)
    ways = {"scalar", "gradients", "gradients_then_scalar", "gradients_and_scalar"}
    ways |= {"round_trip"} if processes == 2 else set()
    assert found.keys() == {w + s for w in ways for s in ("", "_quarter", "_queued")}
    assert all(0 < found[way + s] < 60e6 for way in ways for s in ("", "_quarter"))
    # NaN where the system does not say.
    assert not any(found[f"{way}_queued"] < 0 for way in ways)


def test_the_document_has_the_computed_rows():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for replicas in (8, 64, 1024, 8192):
        row = collectives.predict(replicas, 16.8)
        time, share = row["own_all_reduce_us"], row["own_all_reduce_percent"]
        later = row["own_all_reduce_later_us"]
        assert f"| {replicas} | {time} us | {share:.2f}% | {later} us |" in text


def test_the_document_has_the_rows_of_local_processes():
    results = ROOT / "benchmarks" / "results" / "collectives"
    rows = read(sorted(results.glob("*.jsonl"))[-1])
    assert [row["processes"] for row in rows] == [2, 4, 8]
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert f"{rows[0]['device']}, torch {rows[0]['versions']['torch']}" in text
    assert f"{rows[0]['date']}, {rows[0]['jobs']} jobs" in text
    for row in rows:
        (base, hop), n = (row["base"], row["hop"]), row["processes"]
        assert f"a base of {base:.1f} us" in text and f"{hop:.1f} us for a hop" in text
        # None of them is fitted; base and hop were rounded after they predicted.
        links = collectives.loopback(base, hop)
        predicted = collectives.scalar_all_reduce(n, links)
        assert row["predicted_scalar"] == pytest.approx(predicted, abs=0.1 * n)
        seen, residual = row["scalar_quarter"], row["residual_scalar"]
        assert residual == pytest.approx(seen - row["predicted_scalar"], abs=0.11)
        low, high = row["scalar_quarter_min"], row["scalar_quarter_max"]
        share = 100 * residual / row["predicted_scalar"]
        cells = [f"{n}", f"{row['predicted_scalar']:.0f}"]
        cells += [f"{seen:.0f} ({low:.0f} to {high:.0f})", f"{residual:+.0f}"]
        cells += [f"{share:+.0f}%", f"{row['scalar']:.0f}"]
        cells += [f"{row['scalar_queued']:.0f}"]
        assert f"| {' | '.join(cells)} |" in text
        ways = ("gradients", "gradients_then_scalar", "gradients_and_scalar")
        cells = [f"{n}"] + [f"{row[way] / 1000:.1f}" for way in ways]
        assert f"| {' | '.join(cells)} |" in text


def test_efficiency_is_the_step_time_on_fewest_devices_over_ones_own():
    rows = [
        {"scaling": "mp", "devices": n, "ms_per_step": t}
        for n, t in ((1, 8.0), (2, 10))
    ]
    assert [r["efficiency"] for r in scaling.with_efficiency(rows)] == [1.0, 0.8]
