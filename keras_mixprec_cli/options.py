"""Options that several commands share."""

from __future__ import annotations

import click

# As in `keras_mixprec.policy.POLICIES`, which takes Keras to read.
POLICIES = ("mixed_float16", "mixed_bfloat16", "float32", "auto")

as_json = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='Print JSON instead of text; errors too, as {"error": "..."}.',
)

policy = click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="mixed_float16",
    show_default=True,
    help="What layers compute in; weights stay float32. mixed_float16: float16, with "
    "loss scaling. mixed_bfloat16: bfloat16, which has float32's range, fewer digits, "
    "and needs no loss scaling. float32: no half precision. auto: what the hardware "
    "is fast in, as `keras-mixprec doctor` says.",
)

keep = click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Keep in float32 the layers whose path matches, and all layers inside them: "
    "--keep 'encoder/*'. May be given several times. `keras-mixprec plan` shows the "
    "paths.",
)

imports = click.option(
    "--import",
    "imports",
    multiple=True,
    metavar="MODULE",
    help="Import a Python module first, for the custom layers, losses or metrics that "
    "it defines. Looked for in the working directory too. May be given several times.",
)

safe_mode = click.option(
    "--safe-mode/--no-safe-mode",
    default=True,
    show_default=True,
    help="Refuse to run Python code that is stored in the model file. Switch off only "
    "for files that you trust.",
)
