"""`keras-mixprec convert`: a saved model in half precision, weights untouched."""

from __future__ import annotations

import collections
import pathlib

import click

from keras_mixprec_cli import options
from keras_mixprec_cli.models import check_file
from keras_mixprec_cli.models import load
from keras_mixprec_cli.output import console
from keras_mixprec_cli.output import one_line
from keras_mixprec_cli.output import print_json

_EXPECTED_PLAN = "Expected what `keras-mixprec plan MODEL.keras --json` prints."


@click.command()
@click.argument("source", metavar="IN.keras")
@click.argument("target", metavar="OUT.keras")
@options.policy
@options.keep
@click.option(
    "--plan",
    "plan_file",
    metavar="PLAN.json",
    help="Carry out this plan, written by `keras-mixprec plan --json`, instead of "
    "making one; --policy and --keep are not taken then.",
)
@click.option("--force", is_flag=True, help="Write over OUT.keras if it exists.")
@options.imports
@options.safe_mode
@options.as_json
@click.pass_context
def convert(
    context, source, target, policy, keep, plan_file, force, imports, safe_mode, as_json
) -> None:
    """Convert a saved model to half precision, and save it.

    Its weights stay float32 and as they are, bit for bit; its layers compute in half
    precision, but for those that need float32 (see `keras-mixprec plan`). A compiled
    model keeps its optimizer's state, and trains with loss scaling from then on.

    The way back is `--policy float32`. Python code that loads OUT.keras must
    `import keras_mixprec` first, because Keras looks for its optimizer's class.
    """
    _check(context, target, plan_file, force)
    model = load(source, imports, safe_mode)
    import keras_mixprec as mp
    from keras_mixprec.policy import resolve_policy

    if plan_file:
        plan = _read(plan_file)
        mp.convert(model, plan.policy, plan=plan)
    else:
        mp.convert(model, resolve_policy(policy), keep)
    model.save(target)
    _tell(model, target, as_json)


def _check(context, target, plan_file, force):
    given = {
        name
        for name in ("policy", "keep")
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if plan_file and given:
        names = " and ".join(f"--{name}" for name in sorted(given))
        raise click.UsageError(
            f"--plan says what {names} would say. Leave one of them out.", context
        )
    if pathlib.Path(target).suffix != ".keras":
        raise click.UsageError(f"Expected OUT.keras. Received: '{target}'.", context)
    if pathlib.Path(target).exists() and not force:
        raise click.ClickException(f"'{target}' exists. Add --force to replace it.")
    if not pathlib.Path(target).parent.is_dir():
        raise click.ClickException(
            f"'{target}' cannot be written: its folder does not exist. Make it first."
        )
    if plan_file:
        check_file(plan_file, _EXPECTED_PLAN)


def _read(plan_file):
    import keras_mixprec as mp

    try:
        return mp.PrecisionPlan.from_json(pathlib.Path(plan_file))
    except (ValueError, TypeError) as error:
        raise click.ClickException(
            f"'{plan_file}' is no plan: {one_line(error).rstrip('.')}. {_EXPECTED_PLAN}"
        ) from error


def _tell(model, target, as_json):
    from keras_mixprec.structure import walk

    layers = collections.Counter(p.layer.dtype_policy.name for p in walk(model))
    if as_json:
        print_json({"target": target, "layers": layers})
        return
    counts = ", ".join(f"{n} {policy}" for policy, n in layers.most_common())
    console().print(f"Wrote {target}: {layers.total()} layers, {counts}.", markup=False)
    if model.optimizer is not None:
        console().print("Python code that loads it must `import keras_mixprec` first.")
