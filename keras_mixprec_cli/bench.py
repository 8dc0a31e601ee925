"""`keras-mixprec bench`: step time and memory of a model in each precision."""

from __future__ import annotations

import json
import pathlib

import click

from keras_mixprec_cli import options
from keras_mixprec_cli.keras_import import import_keras
from keras_mixprec_cli.models import import_module
from keras_mixprec_cli.models import load
from keras_mixprec_cli.output import console
from keras_mixprec_cli.output import print_json
from keras_mixprec_cli.output import table

_COLUMNS = ("ms per step", "speed-up", "samples/s", "peak MiB", "first step s")
_MEASURED = ("float32", "mixed_float16", "mixed_bfloat16")


def _count(name, default, text, least=1):
    return click.option(
        name,
        type=click.IntRange(least),
        default=default,
        show_default=True,
        help=text,
    )


@click.command()
@click.argument("model", metavar="MODEL.keras|MODULE:FUNCTION")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(options.POLICIES[:-1]),
    help="What to measure; the first is what the others are compared with. May be "
    f"given several times.  [default: {', '.join(_MEASURED)}]",
)
@_count("--batch-size", 32, "Samples per step.")
@_count("--steps", 10, "Train steps per timed block.")
@_count("--blocks", 5, "Timed blocks; the result is their median.")
@_count("--warmup", 1, "Blocks before timing starts.", least=0)
@options.keep
@options.imports
@options.safe_mode
@options.as_json
def bench(model, policies, keep, imports, safe_mode, as_json, **sizes) -> None:
    """Measure a model's train step in each precision.

    \b
    MODEL.keras      trains on made-up inputs of the model's shapes. One that was
                     saved without a loss is compiled with Adam and squared error.
    MODULE:FUNCTION  calls the function, which returns a compiled model, or
                     (model, x) or (model, x, y) with data of your own.

    The model file is not changed.
    """
    if model.endswith(".py"):
        module = pathlib.Path(model).with_suffix("").name
        raise click.ClickException(
            f"'{model}' is a script. Expected a model file, or the name of a function "
            f"that returns a compiled model: {module}:FUNCTION."
        )
    found, x, y, note = _subject(model, imports, safe_mode)
    from keras_mixprec_cli import samples

    if x is None:
        x, y = samples.made_up(found, sizes["batch_size"])
    sizes |= {"policies": policies or _MEASURED, "keep_float32": keep}
    result = _with_progress(found, x, y, **sizes)
    if as_json:
        print_json(json.loads(result.to_json()))
    else:
        _show(result, note)


def _subject(text, imports, safe_mode):
    """Return a model, its data (or `None`), and what to know about them."""
    module, colon, name = text.partition(":")
    if colon and "/" not in module and not module.endswith((".keras", ".h5")):
        for other in imports:
            import_module(other)
        return *_called(module, name), None
    model = load(text, imports, safe_mode)
    if model.compiled:
        return model, None, None, None
    model.compile("adam", "mse")
    return model, None, None, "It was saved without a loss: Adam and squared error."


def _called(module, name):
    import_keras()
    function = getattr(import_module(module), name, None)
    if not callable(function):
        raise click.ClickException(f"Module '{module}' has no function '{name}'.")
    made = function()
    parts = made if isinstance(made, tuple) else (made,)
    model, x, y = (*parts, None, None)[:3]
    if not hasattr(model, "fit"):
        raise click.ClickException(
            f"Expected {module}:{name} to return a Keras model, (model, x) or "
            f"(model, x, y). Received: {type(made).__name__}."
        )
    return model, x, y


def _with_progress(*subject, **options):
    from rich.progress import Progress

    from keras_mixprec.benchmarking import benchmark

    # On standard error: what is piped on is the result alone.
    out = console(stderr=True)
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)

        def advance(total):
            bar.update(task, total=total, advance=1)

        return benchmark(*subject, **options, verbose=advance)


def _show(result, note):
    columns = {"policy": "left"} | dict.fromkeys(_COLUMNS, "right")
    title = (
        f"{result.model}: batch {result.batch_size}, {result.backend}, {result.device}"
    )
    out = console()
    out.print(table(title, columns, [_cells(row) for row in result]))
    for row in result:
        if row.error:
            out.print(f"{row.policy}: {row.error}", markup=False)
        if row.skipped_steps:
            out.print(
                f"{row.policy}: {row.skipped_steps} of {result.steps} steps skipped"
            )
    if note:
        out.print(note)


def _cells(row):
    forms = {
        "ms_per_step": "{:.2f}",
        "speedup": "{:.2f}x",
        "samples_per_s": "{:,.0f}",
        "peak_memory_mb": "{:,.0f}",
        "compile_s": "{:.1f}",
    }
    values = ((form, getattr(row, name)) for name, form in forms.items())
    return (row.policy, *(None if v is None else form.format(v) for form, v in values))
