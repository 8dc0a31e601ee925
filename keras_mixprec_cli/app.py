"""The command as a whole: its subcommands, its errors, its exit status."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Sequence

import click

from keras_mixprec_cli.bench import bench
from keras_mixprec_cli.convert import convert
from keras_mixprec_cli.doctor import doctor
from keras_mixprec_cli.launch import launch
from keras_mixprec_cli.output import one_line
from keras_mixprec_cli.output import print_json
from keras_mixprec_cli.plan import plan
from keras_mixprec_cli.report import report

# What the library and Keras raise when something is wrong with the input.
_NAME = "keras-mixprec"
_EXPECTED = (ValueError, TypeError, OSError, ImportError)


class _InOrder(click.Group):
    """Lists commands as they were added: in the order in which they are met."""

    def list_commands(self, context):
        return list(self.commands)


@click.group(
    cls=_InOrder,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="keras-mixprec", message="%(package)s %(version)s")
@click.option(
    "--traceback", is_flag=True, help="Show where an error arose, not only its line."
)
@click.pass_context
def cli(context: click.Context, traceback: bool) -> None:
    """Train and convert Keras 3 models in half precision (float16 or bfloat16).

    Half precision halves the memory of activations and is faster on GPUs with tensor
    cores. Start with `keras-mixprec doctor`: it says what this machine gains. A model
    that is saved is for `plan`, `convert` and `bench`; a script that trains one is
    for `launch`. No command changes the file that it reads.

    The backend is Keras's own choice: the environment variable KERAS_BACKEND, which
    is tensorflow, jax or torch.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    if context.invoked_subcommand != "launch":
        # TensorFlow's notes on its build. A script that is launched sees them.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


for command in (doctor, plan, bench, convert, launch, report):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 1 for an error, 2 for misuse.

    Args:
        arguments: The words after `keras-mixprec`. Defaults to those of `sys.argv`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _own_options(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return cli.main(arguments, _NAME, standalone_mode=False) or 0
    except click.UsageError as error:
        return _fail(_usage(error), "--json" in options, 2)
    except click.ClickException as error:
        return _fail(error.format_message(), "--json" in options, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", False, 130)
    except BrokenPipeError:
        # The reader (`head`) has seen enough; Python must not complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _EXPECTED as error:
        if "--traceback" in options:
            raise
        # The library's name of it, which nobody has met who comes from a terminal.
        message = one_line(error).replace("`keep_float32`", "--keep")
        return _fail(message, "--json" in options, 1)


def _own_options(arguments):
    """Return the words that are ours: not those of a script that is launched."""
    return list(itertools.takewhile(lambda word: not word.endswith(".py"), arguments))


def _usage(error):
    command = error.ctx.command_path if error.ctx else _NAME
    message = " ".join(error.format_message().split()).rstrip(".")
    end = "" if message.endswith("?") else "."
    return f"{message}{end} See `{command} --help`."


def _warn(message, *_where):
    click.echo(f"Warning: {one_line(message)}", err=True)


def _fail(message, as_json, status):
    if as_json:
        print_json({"error": message})
    else:
        click.echo(f"Error: {message}", err=True)
    return status
