"""What half precision does, below `mixed_precision/` in TensorBoard.

Through TensorBoard's own package, as `torch.utils.tensorboard` does, and not through
`tf.summary`, which would have TensorFlow take the memory of a GPU that JAX or torch
trains on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

_FOLDER = "mixed_precision"


class Board:
    """Event files in one folder.

    Args:
        log_dir: Folder of the run, created if absent.

    Raises:
        ImportError: If the `tensorboard` extra is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike):
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError(
                "Writing for TensorBoard needs its package. Received: no module "
                f"'{error.name}'. Install it with "
                "`pip install 'keras-mixprec[tensorboard]'`."
            ) from error
        self._writer = EventFileWriter(str(log_dir))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point to a curve for each value.

        Args:
            values: Name below `mixed_precision/` -> number.
            step: Int, the epoch or the batch.
        """
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for name, value in values.items():
            self._add(scalar_pb(f"{_FOLDER}/{name}", float(value)), step)

    def histogram(self, name: str, values: Iterable[float], step: int) -> None:
        """Add one histogram.

        Args:
            name: Name below `mixed_precision/`.
            values: The numbers.
            step: Int.
        """
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._add(histogram_pb(f"{_FOLDER}/{name}", list(values)), step)

    def flush(self) -> None:
        """Write what is still in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Write everything and close the file."""
        self._writer.close()

    def _add(self, summary, step):
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(summary=summary, step=step, wall_time=time.time())
        self._writer.add_event(event)
