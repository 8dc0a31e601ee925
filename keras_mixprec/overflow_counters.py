"""What a `LossScaleOptimizer` counts: how often steps overflowed, and where."""

import operator

import keras
from keras import ops

from keras_mixprec.backend import engine
from keras_mixprec.loss_scale import LossScaleState
from keras_mixprec.loss_scale import next_state


class OverflowCounters:
    """The counters of a `LossScaleOptimizer`: made, moved with the scale, and read.

    Apart from it for the reader alone; users read all of this on the optimizer. They
    are variables of it, so that a compiled step moves them, and saved state has them.
    """

    def _build_counters(self, number):
        self.hysteresis_left = self._add_counter(
            "hysteresis_left", initial_value=self.rule.hysteresis
        )
        self.overflow_counter = self._add_counter("overflow_count")
        self.consecutive_counter = self._add_counter("consecutive_overflows")
        # Of each variable: steps in which its gradient overflowed; those of them in
        # which no variable nearer the loss did, while the loss was finite, and while
        # it was not.
        shape = (3, number)
        self.variable_counters = self._add_counter("overflow_counts", shape)

    def _add_counter(self, name, shape=(), initial_value=0):
        return self.add_variable(
            shape=shape,
            dtype="int",
            initializer=keras.initializers.Constant(initial_value),
            aggregation="none",
            name=name,
        )

    @property
    def overflow_count(self) -> int:
        """Steps skipped since the optimizer was built. Reads the device."""
        return int(self._read("overflow_counter"))

    @property
    def consecutive_overflows(self) -> int:
        """Steps skipped since the last one applied. Reads the device."""
        return int(self._read("consecutive_counter"))

    @property
    def overflow_counts(self) -> dict[str, int]:
        """Variable path -> steps in which its gradient overflowed. Reads the device.

        Of several variables with the same path the second is `path#2`.
        """
        if not self.built:
            return {}
        counts = self._read("variable_counters")[0].tolist()
        return dict(zip(paths_of(self._trainable_variables), counts, strict=True))

    def _read(self, name):
        return ops.convert_to_numpy(getattr(self, name)) if self.built else 0

    def _record(self, flags, variables):
        old = LossScaleState(
            self.dynamic_scale,
            self.step_counter,
            self.hysteresis_left,
            self.overflow_counter,
            self.consecutive_counter,
        )
        # Operators, not `ops`, wherever a plain number takes part: see `next_state`.
        overflowed = ops.cast(flags, self.variable_counters.dtype)
        overflowed = self._by_variable(overflowed, variables)
        n = len(self._trainable_variables)
        places = ops.arange(1, n + 1, dtype=overflowed.dtype)
        # Backward, the last variable is the first that an overflow can reach.
        first = ops.max(overflowed * places)
        values = LossScaleState(*(ops.convert_to_tensor(v) for v in old))
        new = next_state(values, first < 1, self.rule)
        began = ops.cast(ops.equal(places, first), overflowed.dtype)
        step = ops.stack([overflowed, began, ops.zeros_like(began)])
        counts = ops.add(self.variable_counters, step)
        engine.assign([*old, self.variable_counters], [*new, counts])

    def _by_variable(self, flags, variables):
        own = self._trainable_variables
        if len(own) == len(variables) and all(map(operator.is_, own, variables)):
            return flags
        order = [self._get_variable_index(v) for v in variables]
        columns = ops.one_hot(order, len(self._trainable_variables), dtype=flags.dtype)
        return ops.sum(columns * ops.expand_dims(flags, 1), axis=0)


def path_of(variable: keras.Variable) -> str:
    """Return the path of a variable, or its name where it has none."""
    return getattr(variable, "path", None) or variable.name


def paths_of(variables: list) -> list[str]:
    """Return the paths of variables, no two of them the same."""
    # Names are unique only within one layer; as in a plan, the second gets a number.
    seen: dict[str, int] = {}
    paths = []
    for path in map(path_of, variables):
        seen[path] = seen.get(path, 0) + 1
        paths.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return paths
