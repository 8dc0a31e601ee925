"""Import Keras: when it is needed, and without TensorFlow's notes on its build."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

import click

_BACKENDS = ("tensorflow", "jax", "torch")


def import_keras() -> None:
    """Import Keras and this library, whose classes converted models are made of.

    Raises:
        click.ClickException: If KERAS_BACKEND names no backend, or one that is not
            installed.
    """
    backend = os.environ.get("KERAS_BACKEND") or None
    if backend not in (None, *_BACKENDS):
        raise click.ClickException(
            f"Expected KERAS_BACKEND={', '.join(_BACKENDS[:-1])} or {_BACKENDS[-1]}. "
            f"Received: KERAS_BACKEND={backend}."
        )
    try:
        with _without_notes():
            import keras_mixprec  # noqa: F401
            from keras_mixprec.backend import engine

            # TensorFlow looks for devices when they are first asked for, and writes
            # that it found none; `doctor` says so in words.
            engine.accelerator()
    except ModuleNotFoundError as error:
        if error.name != backend:
            raise
        raise click.ClickException(
            f"KERAS_BACKEND={backend} is not installed. "
            f'Install it with `pip install "keras-mixprec[{backend}]"`.'
        ) from error


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Keep what native code writes to standard error, unless something fails.

    TensorFlow writes some lines before it has read `TF_CPP_MIN_LOG_LEVEL`.
    """
    try:
        kept = os.dup(2)
    except OSError:
        # Standard error is closed: there is nothing to keep clean.
        yield
        return
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
