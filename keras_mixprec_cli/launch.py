"""`keras-mixprec launch`: an unchanged script in mixed precision.

Python itself runs the script, in this process's place: `sys.argv`, `__name__`, the
exit status, tracebacks and signals are Python's own. Only `sitecustomize`, which
Python imports at its start, is ours (`launched/sitecustomize.py`).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import click

from keras_mixprec_cli import launched
from keras_mixprec_cli import options


@click.command(context_settings={"allow_interspersed_args": False})
@options.policy
@click.option(
    "--monitor/--no-monitor",
    default=True,
    show_default=True,
    help="Add a MixedPrecisionMonitor to every `fit` that has none, so that its lines "
    "show the loss scale, overflows and memory.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="When the script has ended, print one line of JSON on standard output: the "
    "policy, and the last epoch of each `fit`.",
)
@click.argument("script", metavar="SCRIPT.py")
@click.argument("arguments", metavar="[ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
def launch(policy, monitor, as_json, script, arguments) -> None:
    """Run an unchanged training script in half precision.

    As `python SCRIPT.py ARGUMENTS`, but when the script imports Keras the dtype policy
    is set: layers built from then on compute in half precision, and `compile` gives
    float16 models loss scaling. Options of this command stand before SCRIPT.py; all
    words after it are the script's own:

    \b
        keras-mixprec launch --policy mixed_bfloat16 train.py --epochs 3

    A model that the script loads from a file keeps the precisions it was saved with:
    see `keras-mixprec convert` for it.
    """
    if not pathlib.Path(script).exists():
        raise click.ClickException(
            f"'{script}' does not exist. Expected a Python script."
        )
    if script.endswith((".keras", ".h5")):
        raise click.ClickException(
            f"'{script}' is a model. Expected a Python script; "
            f"for a model there is `keras-mixprec convert {script} half.keras`."
        )
    what = {"policy": policy, "monitor": monitor, "json": as_json}
    _become_python([script, *arguments], environment(what))


def environment(what: dict) -> dict[str, str]:
    """Return the environment in which Python runs a script in mixed precision.

    Args:
        what: `policy`, `monitor` and `json`, as the command's options.
    """
    paths = [str(pathlib.Path(launched.__file__).parent), os.environ.get("PYTHONPATH")]
    # Which process it is: those that the script starts inherit the rest, not the JSON.
    process = os.getpid() if os.name == "posix" else None
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        launched.VARIABLE: json.dumps({**what, "process": process}),
    }


def _become_python(words: Sequence[str], environ: dict[str, str]) -> None:
    command = [sys.executable, *words]
    if os.name == "posix":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, command, environ)
    # Windows cannot replace a process: its parent would not wait for the new one.
    sys.exit(subprocess.call(command, env=environ))
