"""Load a model, and say in one line why one cannot be loaded."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import click

from keras_mixprec_cli.keras_import import import_keras

_EXPECTED = 'Expected a model file that `model.save("model.keras")` wrote.'


def load(
    path: str, imports: Sequence[str] = (), safe_mode: bool = True, compile: bool = True
) -> Any:
    """Return the model in a file that `model.save` wrote.

    Args:
        path: The file: `.keras`, or `.h5`.
        imports: Modules to import first, for the custom objects they define.
        safe_mode: Whether to refuse Python code in the file.
        compile: Whether to load loss, metrics and optimizer as well.

    Raises:
        click.ClickException: If there is no such file, it is no model, or it uses
            what is unknown here.
    """
    check_file(path)
    is_zip = path.endswith(".keras") and zipfile.is_zipfile(path)
    if not is_zip and not path.endswith((".h5", ".hdf5")):
        raise click.ClickException(f"'{path}' is no Keras model. {_EXPECTED}")
    import_keras()
    modules = [import_module(name) for name in imports]
    import keras

    known = {k: v for module in modules for k, v in _custom_objects(module).items()}
    try:
        with warnings.catch_warnings():
            # Iterations and rate alone: it never trained, so that nothing is skipped.
            warnings.filterwarnings("ignore", ".*the saved optimizer has 2 variables")
            return keras.saving.load_model(path, known, compile, safe_mode)
    except (TypeError, ValueError, OSError, ImportError, AttributeError) as error:
        raise click.ClickException(_reason(path, str(error))) from error


def check_file(path: str, expected: str = _EXPECTED) -> None:
    """Raise unless `path` is a file; `expected` says which one is asked for."""
    if not pathlib.Path(path).is_file():
        what = "is a folder" if pathlib.Path(path).is_dir() else "does not exist"
        raise click.ClickException(f"'{path}' {what}. {expected}")


def import_module(name: str) -> ModuleType:
    """Import a module, from the working directory too, as `python -m` does.

    Raises:
        click.ClickException: If there is no such module.
    """
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        return importlib.import_module(name)
    except SystemExit as error:
        raise click.ClickException(
            f"Importing '{name}' ended with exit status {error.code}: it runs as a "
            "script. Put what it does as a script under `if __name__ == '__main__':`."
        ) from error
    except ImportError as error:
        raise click.ClickException(
            f"Cannot import '{name}': {error}. Pass the name of a module in the "
            f"working directory or an installed one, without '.py'."
        ) from error


def _custom_objects(module):
    """Return the classes and functions of a module, by the names files know."""
    import keras

    own = {
        name: value
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }
    registered = {keras.saving.get_registered_name(v): v for v in own.values()}
    # A class that is not registered is saved under Keras's default package.
    return {f"Custom>{name}": v for name, v in own.items()} | own | registered


def _reason(path, message):
    unknown = re.search(r"Could not locate (\w+) '([^']+)'", message)
    if unknown:
        return _unknown(path, *unknown.groups(), message)
    if "No model config found" in message:
        return f"'{path}' holds weights alone, not the model's layers. {_EXPECTED}"
    if "safe_mode" in message or "Lambda" in message:
        return (
            f"'{path}' holds Python code (a Lambda layer), which is not run in safe "
            "mode. If you trust the file, add --no-safe-mode."
        )
    first = re.split(r"(?<=\.)\s|\n", message.strip(), maxsplit=1)[0]
    return f"'{path}' cannot be loaded: {' '.join(first.split())}"


def _unknown(path, kind, name, message):
    module = re.search(
        rf"'module': '([^']+)', 'class_name': '{re.escape(name)}'", message
    )
    saved = module[1] if module and module[1] != "builtins" else None
    origin = f", saved from module '{saved}'" if saved else ""
    return (
        f"'{path}' uses the custom {kind} '{name}'{origin}, which is not known here. "
        f"Name the module that defines it: --import {saved or 'MODULE'}"
    )
