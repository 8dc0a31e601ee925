"""The latency model by hand, and that the document says what it computes."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import collectives  # noqa: E402
import scaling  # noqa: E402


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


def test_the_fit_goes_through_both_points():
    base, per_hop = collectives.fit({2: 10.0, 4: 16.0})
    assert (base, per_hop) == (4.0, 3.0)


def test_the_document_has_the_computed_rows():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for replicas in (8, 64, 1024, 8192):
        row = collectives.predict(replicas, 16.8)
        time, share = row["own_all_reduce_us"], row["own_all_reduce_percent"]
        assert f"| {replicas} | {time} us | {share:.2f}% |" in text


def test_efficiency_is_the_step_time_on_fewest_devices_over_ones_own():
    rows = [
        {"scaling": "mp", "devices": n, "ms_per_step": t}
        for n, t in ((1, 8.0), (2, 10))
    ]
    assert [r["efficiency"] for r in scaling.with_efficiency(rows)] == [1.0, 0.8]
