"""`keras-mixprec plan`: which layer would compute in what, and why."""

from __future__ import annotations

import json

import click

from keras_mixprec_cli import options
from keras_mixprec_cli.models import load
from keras_mixprec_cli.output import console
from keras_mixprec_cli.output import print_json
from keras_mixprec_cli.output import table


@click.command()
@click.argument("model", metavar="MODEL.keras")
@options.policy
@options.keep
@options.imports
@options.safe_mode
@options.as_json
def plan(model, policy, keep, imports, safe_mode, as_json) -> None:
    """Show which layer of a model would compute in what, and why.

    Nothing is changed. The JSON is what `keras-mixprec convert --plan` reads, so that
    it can be edited in between:

    \b
        keras-mixprec plan model.keras --json > plan.json
        keras-mixprec convert model.keras half.keras --plan plan.json
    """
    loaded = load(model, imports, safe_mode, compile=False)
    from keras_mixprec.plan import plan as make_plan
    from keras_mixprec.policy import resolve_policy

    made = make_plan(loaded, resolve_policy(policy), keep)
    if as_json:
        print_json(json.loads(made.to_json()))
    else:
        show(made, loaded.name)


def show(made, name: str) -> None:
    """Print a plan as a table, with what it amounts to below."""
    columns = dict.fromkeys(("layer", "class", "computes in", "why"), "left")
    rows = [(row.path, row.layer_class, row.policy, row.reason) for row in made]
    out = console()
    out.print(table(f"{name}: {made.policy}", columns, rows))
    # The foot and the advice, as the plan itself prints them.
    for line in str(made).split("\n\n", 1)[1].splitlines():
        out.print(line, markup=False)
