"""`PrecisionPlan`: which layer computes in what, and why; prints, saves, compares."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import json
import os
from collections.abc import Iterator

POLICIES = ("mixed_float16", "mixed_bfloat16", "float32")
HALF = ("mixed_float16", "mixed_bfloat16")


@dataclasses.dataclass
class LayerPlan:
    """One layer of a plan.

    Args:
        path: Names from below the model, joined by "/".
        layer_class: Name of the layer's class.
        policy: Name of the dtype policy it gets.
        reason: Why.
        parameters: Int, weights that the layer itself owns.
        multiply_adds: Int, for one example; unknown dimensions count as 1.
        advice: What costs speed or range here, if anything.
        measured: What `calibrate` measured, by name; empty if it did not.
    """

    path: str
    layer_class: str
    policy: str
    reason: str
    parameters: int = 0
    multiply_adds: int = 0
    advice: list[str] = dataclasses.field(default_factory=list)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PrecisionPlan:
    """The rows of a plan, in the order of the model's layers.

    Args:
        policy: Name of the policy that was asked for.
        rows: List of `LayerPlan`.
        advice: What concerns the model as a whole.
        initial_scale: The loss scale to begin with, as `calibrate` proposes it, or
            None.
        activations: `"float32"` if activation functions compute in float32, or None.
    """

    policy: str
    rows: list[LayerPlan]
    advice: list[str] = dataclasses.field(default_factory=list)
    initial_scale: float | None = None
    activations: str | None = None

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> LayerPlan:
        return self.match(path)[0]

    def match(self, pattern: str) -> list[LayerPlan]:
        """Return the rows whose path is, or fits, a glob pattern.

        Args:
            pattern: A path, or a pattern in which `*` also matches "/".

        Returns:
            The rows, at least one.

        Raises:
            ValueError: If nothing matches; the message lists near misses.
        """
        rows = [row for row in self.rows if row.path == pattern]
        rows = rows or [r for r in self.rows if fnmatch.fnmatchcase(r.path, pattern)]
        if not rows:
            raise ValueError(
                "Expected the path of a layer, or a pattern that matches one. "
                f"Received: '{pattern}'. "
                + near_misses(pattern, [row.path for row in self.rows])
            )
        return rows

    def override(self, pattern: str, policy: str) -> PrecisionPlan:
        """Change the policy of the layers that a pattern matches, in place.

        Args:
            pattern: A path, or a glob pattern.
            policy: `"mixed_float16"`, `"mixed_bfloat16"` or `"float32"`.

        Returns:
            This plan.

        Raises:
            ValueError: If the policy is unknown or nothing matches.
        """
        policy = check_policy(policy)
        for row in self.match(pattern):
            row.policy, row.reason = policy, "user"
        return self

    def counts(self) -> dict[str, int]:
        """Return the number of layers per policy, the most frequent first."""
        return dict(collections.Counter(r.policy for r in self.rows).most_common())

    def half_share(self, quantity: str) -> float:
        """Return the part of a quantity that is in half precision, from 0 to 1.

        Args:
            quantity: `"parameters"` or `"multiply_adds"`.
        """
        total = sum(getattr(row, quantity) for row in self.rows)
        half = sum(getattr(row, quantity) for row in self.rows if row.policy in HALF)
        return half / total if total else 0.0

    def __str__(self) -> str:
        head = ("path", "class", "policy", "reason")
        cells = [(r.path, r.layer_class, r.policy, r.reason) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        rule = tuple("-" * width for width in widths)
        lines = [_line(row, widths) for row in (head, rule, *cells)]
        return "\n".join([*lines, "", *self._foot(), *self._advice_lines()])

    __repr__ = __str__

    def _foot(self) -> list[str]:
        counts = ", ".join(f"{n} {policy}" for policy, n in self.counts().items())
        lines = [
            f"{len(self)} layers: {counts}",
            f"in half precision: {self.half_share('parameters'):.1%} of parameters, "
            f"{self.half_share('multiply_adds'):.1%} of multiply-adds",
        ]
        if self.initial_scale is not None:
            lines.append(f"initial loss scale: {self.initial_scale:g}")
        if self.activations is not None:
            lines.append(f"activation functions in {self.activations}")
        return lines

    def _advice_lines(self) -> list[str]:
        of_rows = [f"{r.path}: {advice}" for r in self.rows for advice in r.advice]
        return [f"advice: {advice}" for advice in self.advice + of_rows]

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Return the plan as JSON, and write it to a file if one is named.

        Args:
            path: File to write, or None.

        Returns:
            The JSON text.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike) -> PrecisionPlan:
        """Return the plan that `to_json` wrote.

        Args:
            source: The JSON text, or the file that holds it.

        Returns:
            A `PrecisionPlan` equal to the one that was written.

        Raises:
            ValueError: If the JSON is no plan, or names an unknown policy.
        """
        if isinstance(source, os.PathLike) or not str(source).lstrip().startswith("{"):
            with open(source, encoding="utf-8") as file:
                source = file.read()
        fields = json.loads(source)
        try:
            rows = [LayerPlan(**row) for row in fields["rows"]]
            rest = {**fields, "policy": check_policy(fields["policy"]), "rows": rows}
            return cls(**rest)
        except (KeyError, TypeError) as error:
            raise ValueError(
                "Expected the JSON that `PrecisionPlan.to_json` writes. "
                f"Received: an object that does not fit: {error}. "
                "Write it again with this version of keras_mixprec."
            ) from error


def _line(cells, widths) -> str:
    return "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()


def check_policy(policy) -> str:
    """Return the name of a policy that a plan can give to a layer.

    Args:
        policy: Name, or `keras.DTypePolicy`.

    Raises:
        ValueError: If it is none of `POLICIES`.
    """
    name = policy if isinstance(policy, str) else getattr(policy, "name", policy)
    if name not in POLICIES:
        choices = ", ".join(f'"{choice}"' for choice in POLICIES)
        raise ValueError(
            f"Expected `policy` to be one of {choices}. "
            f"Received: policy={policy!r}. Pass one of these names."
        )
    return name


def near_misses(pattern: str, paths: list[str]) -> str:
    """Return a sentence that lists the paths a wrong pattern may have meant."""
    last = pattern.rsplit("/", 1)[-1].strip("*")
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)
    near += [path for path in paths if last and last in path][:3]
    names = ", ".join(f"'{path}'" for path in dict.fromkeys(near or paths[:5]))
    return f"{'Near misses' if near else 'The paths begin with'}: {names}."
