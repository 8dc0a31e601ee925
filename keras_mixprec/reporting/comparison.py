"""What runs side by side say, in words."""

from dataclasses import dataclass

from keras_mixprec.reporting.runs import Run
from keras_mixprec.reporting.runs import finite

# Trainings that differ in nothing but the seed end about as far apart.
_AGREEMENT_POINTS = 1.0
_PEAK = "gpu_memory_peak_mb"


@dataclass(frozen=True)
class Verdict:
    """One sentence or two about a run.

    Attributes:
        level: `"good"`, `"info"`, `"warning"` or `"bad"`.
        text: What was seen, and what to do about it.
    """

    level: str
    text: str


def compare_accuracy(runs: list[Run]) -> Verdict | None:
    """Return how far apart the runs' accuracies end, if they all have one."""
    key = _accuracy_key(runs)
    if key is None:
        return None
    ends = {run.label: 100 * run.last(key) for run in runs}
    apart = max(ends.values()) - min(ends.values())
    each = ", ".join(f"{label} {value:.2f}%" for label, value in ends.items())
    return Verdict(
        "good" if apart <= _AGREEMENT_POINTS else "warning",
        f"{key} of the last epoch: {each}; {apart:.2f} points apart.",
    )


def compare_memory(runs: list[Run]) -> Verdict | None:
    """Return what the runs take of the float32 run's memory, if there is one."""
    peaks = {
        run.label: max(finite(run.logs[_PEAK].values()), default=0.0)
        for run in runs
        if _PEAK in run.logs
    }
    reference = _float32_run([run for run in runs if peaks.get(run.label)])
    if reference is None or len(peaks) < 2:
        return None
    whole = peaks.pop(reference.label)
    each = ", ".join(
        f"{label} {peak:,.0f} MiB ({peak / whole - 1:+.0%})"
        for label, peak in peaks.items()
    )
    return Verdict(
        "good" if max(peaks.values()) < whole else "info",
        f"Peak GPU memory: {reference.label} {whole:,.0f} MiB, {each}.",
    )


def _float32_run(runs):
    # In float32 nothing scales the loss; bfloat16 shows in the plan, or in the name.
    found = [r for r in runs if r.plan is None and not r.matching("loss_scale")]
    named = [r for r in found if "float32" in r.label]
    found = named or [r for r in found if "bfloat16" not in r.label]
    return found[0] if len(found) == 1 else None


def _accuracy_key(runs):
    shared = [k for k in runs[0].logs if all(k in run.logs for run in runs)]
    found = [k for k in shared if "acc" in k]
    return next((k for k in found if k.startswith("val_")), next(iter(found), None))
