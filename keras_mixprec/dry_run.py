"""The dry run: try a plan on real numbers, and keep what fails in float32."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import keras
import numpy as np

from keras_mixprec.inputs import zero_inputs
from keras_mixprec.intercept import intercepted
from keras_mixprec.precision_plan import HALF
from keras_mixprec.precision_plan import PrecisionPlan
from keras_mixprec.precisions import preserved
from keras_mixprec.precisions import reset_precisions
from keras_mixprec.precisions import rows_by_layer
from keras_mixprec.precisions import set_precisions
from keras_mixprec.rules import LARGEST_FLOAT16
from keras_mixprec.structure import graph_of
from keras_mixprec.structure import is_float
from keras_mixprec.structure import walk
from keras_mixprec.untouched import unchanged_variables


@dataclasses.dataclass
class Run:
    """What one forward pass showed.

    Args:
        largest: Operation id -> largest magnitude it returned, inf if not finite.
        order: The operations in order of completion, each with those around it.
        failed: The innermost operation that raised, with those around it.
        error: The exception that ended the pass, or None.
    """

    largest: dict[int, float] = dataclasses.field(default_factory=dict)
    order: list[tuple] = dataclasses.field(default_factory=list)
    failed: tuple | None = None
    error: Exception | None = None

    def note_failure(self, operation: keras.Operation, above: tuple) -> None:
        """Note who raised, unless the exception only passes through."""
        if self.failed is None or all(x is not operation for x in self.failed[1]):
            self.failed = (operation, above)

    def note_outputs(self, operation: keras.Operation, above: tuple, outputs) -> None:
        """Note how large the outputs of a call are."""
        sizes = [_largest(x) for x in keras.tree.flatten(outputs)]
        before = self.largest.get(id(operation), 0.0)
        self.largest[id(operation)] = max([before, *sizes])
        self.order.append((operation, above))


def dry_run(model: keras.Model, plan: PrecisionPlan, sample: Any = None) -> None:
    """Run the model once as planned; change the plan, not the model, where it fails.

    A layer that raises, or returns what is not finite where float32 is, gets float32,
    one after the other until the model passes.

    Args:
        model: `keras.Model`.
        plan: The plan, changed in place.
        sample: Inputs of the model. Defaults to zeros of the input shapes.
    """
    try:
        args, kwargs = zero_inputs(model) if sample is None else ((sample,), {})
    except Exception as error:  # Shapes that were never known, or types without zero.
        plan.advice.append(f"no dry run: {_one_line(error)}")
        return
    with preserved(model), unchanged_variables(model):
        reset_precisions(model)
        reference = _run(model, args, kwargs)
        if reference.error is not None:
            plan.advice.append(f"no dry run: {_one_line(reference.error)}")
            return
        _keep_overflowing(model, plan, reference)
        while _try_once(model, plan, reference, args, kwargs):
            pass


def _keep_overflowing(model, plan, reference) -> None:
    """Keep at once what float16 cannot hold, instead of finding it run by run."""
    for place, row in rows_by_layer(model, plan):
        largest = reference.largest.get(id(place.layer), 0.0)
        is_graph = graph_of(place.layer) is not None
        if row.policy == "mixed_float16" and not is_graph and _is_beyond(largest):
            row.policy, row.reason = "float32", _overflow(largest)


def _is_beyond(largest: float) -> bool:
    return LARGEST_FLOAT16 < largest < np.inf


def _overflow(largest: float) -> str:
    return f"overflowed in the dry run: max {largest:.1e}"


def _try_once(model, plan, reference, args, kwargs) -> bool:
    """Return whether a failure was found and met; then it is worth another try."""
    set_precisions(model, plan)
    run = _run(model, args, kwargs)
    failure = _first_failure(run, reference)
    if failure is None:
        return False
    rows = {id(place.layer): row for place, row in rows_by_layer(model, plan)}
    operation, around = failure
    culprits = _culprits(operation, around, rows)
    if not culprits and run.error is not None:
        culprits = [key for key, row in rows.items() if row.policy in HALF]
    reason = _reason(run, reference, operation)
    for key in culprits:
        rows[key].policy, rows[key].reason = "float32", reason
    return bool(culprits)


def _run(model, args, kwargs) -> Run:
    run = Run()
    stack: list = []

    def around(operation, call, args, kwargs):
        above = tuple(stack)
        stack.append(operation)
        try:
            outputs = call(*args, **kwargs)
        except Exception:
            run.note_failure(operation, above)
            raise
        finally:
            stack.pop()
        run.note_outputs(operation, above, outputs)
        return outputs

    with intercepted(_operations(model), around):
        try:
            model(*args, training=False, **kwargs)
        except Exception as error:
            run.error = error
    return run


def _operations(model) -> list:
    found = {}
    for place in walk(model):
        graph = graph_of(place.layer)
        for operation in (place.layer, *(graph.operations if graph else ())):
            found[id(operation)] = operation
    return list(found.values())


def _largest(x) -> float:
    """Return the largest magnitude in a tensor, inf for NaN, 0.0 if it has no value."""
    if not hasattr(x, "dtype") or not is_float(x):
        return 0.0
    try:
        values = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))
    except Exception:  # Inside a compiled loop a tensor has no value yet.
        return 0.0
    if not values.size:
        return 0.0
    largest = float(np.abs(values).max())
    return largest if np.isfinite(largest) else np.inf


def _first_failure(run, reference):
    if run.error is not None:
        return run.failed
    for operation, above in run.order:
        was = reference.largest.get(id(operation), np.inf)
        if np.isfinite(was) and not np.isfinite(run.largest[id(operation)]):
            return operation, above
    return None


def _culprits(operation, above, rows) -> list[int]:
    """Return the layers to blame: the operation itself, those around it, or before."""
    for candidate in (operation, *reversed(above)):
        if isinstance(candidate, keras.Layer) and graph_of(candidate) is not None:
            continue  # A graph computes nothing itself.
        if _is_half(candidate, rows):
            return [id(candidate)]
    return _feeding(operation, rows)


def _feeding(operation, rows) -> list[int]:
    sources = [
        tensor._keras_history[0]
        for node in operation._inbound_nodes
        for tensor in node.input_tensors
    ]
    found = [id(source) for source in sources if _is_half(source, rows)]
    for source in sources:
        if not isinstance(source, keras.Layer):
            found += _feeding(source, rows)
    return found


def _is_half(operation, rows) -> bool:
    return id(operation) in rows and rows[id(operation)].policy in HALF


def _reason(run, reference, operation) -> str:
    if run.error is not None:
        return f"raised in the dry run: {_one_line(run.error)}"
    largest = reference.largest[id(operation)]
    if _is_beyond(largest):
        return _overflow(largest)
    return "not finite in the dry run"


def _one_line(error) -> str:
    """Return the exception's own first line, without what Keras puts around it."""
    text = re.sub(r"\x1b\[\d+m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith("Exception encountered")]
    return f"{type(error).__name__}: {(own or [''])[0][:80]}"
