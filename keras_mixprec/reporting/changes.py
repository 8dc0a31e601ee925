"""The picture of a plan that changed during training: layers x epochs."""

from __future__ import annotations

import os

_COLORS = {
    "float32": "#c44e52",
    "mixed_bfloat16": "#dd8452",
    "mixed_float16": "#4c72b0",
}


def draw(changes: list, epochs: int, path: str | os.PathLike) -> None:
    """Draw the policies of the layers that changed, epoch by epoch, into a PNG.

    Args:
        changes: List of `keras_mixprec.callbacks.adaptive.PrecisionChange`.
        epochs: Int, the epochs of the run.
        path: File to write.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no changes.
    """
    if not changes:
        raise ValueError(
            "There is nothing to draw: no layer changed its policy. Received: "
            "changes=[]. Train with `AdaptivePrecision` first."
        )
    # Without pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(change.path for change in changes))
    epochs = max(epochs, changes[-1].epoch + 2)
    figure = Figure(figsize=(8, 1.6 + 0.35 * len(layers)), layout="constrained")
    axes = figure.subplots()
    drawn = set()
    for row, layer in enumerate(layers):
        for start, end, policy in spans(
            [c for c in changes if c.path == layer], epochs
        ):
            label = policy if policy not in drawn else None
            drawn.add(policy)
            color = _COLORS.get(policy, "#8c8c8c")
            axes.barh(row, end - start, 0.6, start + 0.5, color=color, label=label)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlim(0.5, epochs + 0.5)
    axes.set_xlabel("epoch")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, format="png", dpi=110)


def spans(changes: list, epochs: int) -> list[tuple[int, int, str]]:
    """Return one layer's policies as `(first epoch, end, policy)`, epochs from 0.

    Args:
        changes: The layer's changes, oldest first, at least one.
        epochs: Int, the epochs of the run.
    """
    starts = [0, *(change.epoch + 1 for change in changes)]
    policies = [changes[0].before, *(change.after for change in changes)]
    return list(zip(starts, [*starts[1:], epochs], policies, strict=True))
