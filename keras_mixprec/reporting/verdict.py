"""What the logs of a run mean, in words."""

import math

from keras_mixprec.diagnosis import describe
from keras_mixprec.diagnosis import keep_float32
from keras_mixprec.reporting.comparison import Verdict
from keras_mixprec.reporting.comparison import compare_accuracy
from keras_mixprec.reporting.comparison import compare_memory
from keras_mixprec.reporting.runs import Run
from keras_mixprec.tensor_cores import IDLE_TENSOR_CORES

# More than that, late in training, and steps are lost rather than scales tried.
_LARGEST_LATE_SHARE = 0.1


def judge(runs: list[Run]) -> list[Verdict]:
    """Return a verdict for each run, and one on how they compare."""
    found = [compare_accuracy(runs), compare_memory(runs)] if len(runs) > 1 else []
    for run in runs:
        found += [_judge_one(run), _judge_layers(run), _judge_tensor_cores(run)]
    return [v for v in found if v]


def format_scale(scale: float) -> str:
    """Return a loss scale as people write it: `32,768 (2^15)`."""
    if not scale > 0 or math.isinf(scale):
        return str(scale)
    exponent = f"2^{math.log2(scale):.4g}"
    return f"{scale:,.0f} ({exponent})" if scale >= 1 else exponent


def _judge_one(run):
    loss, scales = run.last("loss"), run.matching("loss_scale")
    if loss is not None and not math.isfinite(loss):
        return Verdict(
            "bad",
            f"{run.label}: the loss of the last epoch is {loss}. Look for NaN or inf "
            "in the data, a learning rate that is too high, or a layer that needs "
            "float32.",
        )
    if not scales:
        return Verdict(
            "info",
            f"{run.label}: no loss scale was logged. Right in float32 and bfloat16; "
            "a float16 run needs MixedPrecisionMonitor() among its callbacks.",
        )
    return _judge_scale(run, min(run.last(key) for key in scales))


def _judge_scale(run, scale):
    where = f"the loss scale ended at {format_scale(scale)}"
    counts = run.matching("overflow_count")
    if not scale >= 1 or math.isinf(scale):
        return Verdict(
            "warning",
            f"{run.label}: {where}. A sound model rarely needs one outside 1 to 2^24: "
            "look for values that float16 cannot hold.",
        )
    if not counts:
        return Verdict(
            "info",
            f"{run.label}: {where}. Overflows were not counted: compile with "
            "keras_mixprec.LossScaleOptimizer to see them.",
        )
    return _judge_counts(run, counts, where)


def _judge_counts(run, counts, where):
    total = int(sum(sum(values.values()) for values in counts.values()))
    late = _late_share(run, counts)
    if late > _LARGEST_LATE_SHARE:
        return Verdict(
            "warning",
            f"{run.label}: {late:.0%} of the steps in the second half of training "
            f"overflowed and were skipped; {where}. "
            f"{_remedy(run) or 'Some layer needs float32.'}",
        )
    if not total:
        return Verdict("good", f"{run.label}: no step overflowed; {where}.")
    epochs = [e for values in counts.values() for e, n in values.items() if n]
    return Verdict(
        "good",
        f"{run.label}: {_steps(total)} overflowed and {_was(total)} skipped"
        f"{_of_all(run, counts, total)}, the last in epoch {max(epochs)}; {where}. "
        "Weights were never touched by these steps"
        f"{'' if run.all_overflows.nonfinite_loss else ': loss scaling at work'}.",
    )


def _remedy(run):
    where = run.all_overflows
    return f"To mend it, {keep_float32(where)}." if where.steps else None


def _judge_layers(run):
    where = run.all_overflows
    if not where.steps:
        return None
    lost = _late_share(run, run.matching("overflow_count")) > _LARGEST_LATE_SHARE
    level = "warning" if lost or _lasting_nonfinite_loss(run) else "info"
    return Verdict(level, f"{run.label}: {describe(where, 'in this run')}")


def _lasting_nonfinite_loss(run):
    # No loss scale settles those: the same data come back in every epoch.
    epochs = [e for values in run.logs.values() for e in values]
    middle = (min(epochs) + max(epochs)) / 2
    return any(w.nonfinite_loss and e > middle for e, w in run.overflows.items())


def _judge_tensor_cores(run):
    share = run.last("tensor_core_util")
    if share is None or run.plan is None:
        return None
    what = f"{run.label}: tensor cores were busy {share:.0f}% of the last epoch"
    if share >= IDLE_TENSOR_CORES:
        return Verdict("good", f"{what}.")
    return Verdict(
        "warning",
        f"{what}, although the model computes in half precision. Look for dimensions "
        "that are not multiples of 8, input that keeps the GPU waiting, or a model "
        "that is not compiled with XLA.",
    )


def _late_share(run, counts):
    if not run.steps_per_epoch:
        return 0.0
    shares = []
    for values in counts.values():
        late = list(values.values())[len(values) // 2 :]
        shares.append(sum(late) / (run.steps_per_epoch * len(late)))
    return max(shares)


def _of_all(run, counts, total):
    if not run.steps_per_epoch:
        return ""
    steps = run.steps_per_epoch * sum(map(len, counts.values()))
    return f" ({total / steps:.1%} of {steps:,})"


def _steps(n):
    return "1 step" if n == 1 else f"{n:,} steps"


def _was(n):
    return "was" if n == 1 else "were"
