"""The rows of `run_matrix.py`: presets for what the tables show, or a file's own."""

import itertools
import pathlib
import shlex

_BERT = "train_step.py --model bert"
_THREE = "--scaling none,keras,mp"
# Where ours without scaling is faster than Keras already.
_FOUR = "--scaling none,keras,unscaled,mp"
_SAME_ORDER = (
    "scaling.py --devices 2 --scaling mp --model bert --size full --check "
    "--deterministic"
)
BACKENDS = ("tensorflow", "jax", "torch")
_TRAININGS = (
    "trainings.py --only transformer",
    "trainings.py --only recommender",
    "trainings.py --only cnn",
    "passing_fault.py",
)


def _scaling(model):
    # What the table is about first: what our scaling adds to a step, on two and one.
    return "\n".join(
        f"{backend} scaling.py --devices {devices} --scaling {way} --model {model} "
        "--size full --check"
        for way, devices, backend in itertools.product(
            ("mp", "none", "keras"), (2, 1), BACKENDS
        )
    )


# In the order of what matters most: a lent GPU may be gone before the end.
PRESETS = {
    "tf-xla": f"""
        tensorflow {_BERT} --xla {_FOUR}
        tensorflow {_BERT} --xla --scaling none
        tensorflow {_BERT} --xla --scaling mp
        tensorflow {_BERT} --xla --scaling keras
        tensorflow {_BERT} --xla --scaling mp,mp+monitor --steps 100
        tensorflow {_BERT} --xla --scaling mp --activations float32
    """,
    "tf-noxla": f"""
        tensorflow {_BERT} --no-xla {_FOUR}
        tensorflow {_BERT} --no-xla --scaling none
        tensorflow {_BERT} --no-xla --scaling mp
        tensorflow {_BERT} --no-xla --scaling keras
    """,
    "jax": f"""
        jax {_BERT} {_THREE}
        jax {_BERT} --scaling none
        jax {_BERT} --scaling mp
        jax {_BERT} --scaling keras
        jax {_BERT} --scaling mp,mp+monitor --steps 100
        jax {_BERT} --scaling mp --activations float32
    """,
    "torch": f"""
        torch {_BERT} {_THREE}
        torch {_BERT} --scaling none
        torch {_BERT} --scaling mp
        torch {_BERT} --scaling keras
        torch {_BERT} --scaling mp,mp+monitor --steps 50
    """,
    "precision": f"""
        tensorflow {_BERT} --xla --policy float32 --scaling none
        tensorflow {_BERT} --xla --policy tf32 --scaling none
        tensorflow {_BERT} --xla --policy mixed_bfloat16 --scaling none
        jax {_BERT} --policy float32 --scaling none
        jax {_BERT} --policy tf32 --scaling none
        jax {_BERT} --policy mixed_bfloat16 --scaling none
        torch {_BERT} --policy float32 --scaling none
        torch {_BERT} --policy tf32 --scaling none
        torch {_BERT} --policy mixed_bfloat16 --scaling none
    """,
    "resnet": f"""
        tensorflow train_step.py --model resnet --xla {_THREE}
        jax train_step.py --model resnet {_THREE}
        tensorflow train_step.py --model resnet --xla --scaling none
        tensorflow train_step.py --model resnet --xla --scaling mp
        jax train_step.py --model resnet --scaling none
        jax train_step.py --model resnet --scaling mp
        torch train_step.py --model resnet {_THREE}
    """,
    "dlrm": f"""
        tensorflow train_step.py --model dlrm --xla {_THREE}
        jax train_step.py --model dlrm {_THREE}
        tensorflow train_step.py --model dlrm --no-xla {_THREE}
        tensorflow train_step.py --model dlrm --xla --scaling none
        tensorflow train_step.py --model dlrm --xla --scaling mp
        jax train_step.py --model dlrm --scaling none
        jax train_step.py --model dlrm --scaling mp
        torch train_step.py --model dlrm {_THREE}
    """,
    "mlp": f"""
        tensorflow train_step.py --model mlp --xla {_THREE}
        jax train_step.py --model mlp {_THREE}
        torch train_step.py --model mlp {_THREE}
    """,
    "peers": """
        torch peers.py --model bert --mode eager --policy mixed_float16
        torch peers.py --model bert --mode compile --policy mixed_float16
        torch peers.py --model bert --mode eager --policy tf32
        torch peers.py --model bert --mode eager --policy float32
        torch peers.py --model bert --mode compile --policy mixed_bfloat16
        torch peers.py --model resnet --mode eager --policy mixed_float16
        torch peers.py --model resnet --mode compile --policy mixed_float16
        torch peers.py --model dlrm --mode eager --policy mixed_float16
        torch peers.py --model dlrm --mode compile --policy mixed_float16
    """,
    "optimizer": """
        tensorflow optimizer_step.py
        jax optimizer_step.py
        torch optimizer_step.py
    """,
    "inspector": """
        jax inspector_overhead.py --seconds 20
        tensorflow inspector_overhead.py --seconds 20
        torch inspector_overhead.py --seconds 100 --steps 5 --pairs 150
        tensorflow inspector_overhead.py --seconds 20 --jit-compile no
    """,
    "activations": """
        jax activations.py
        tensorflow activations.py
        jax activations.py --what bert --policy mixed_float16
        tensorflow activations.py --what bert --policy mixed_float16
    """,
    # Apart: fewer ResNets fit on a GPU side by side, of 24 GiB each while cuDNN's and
    # XLA's kernels are chosen, than BERTs, of 5 to 7.
    "scaling": f"""
        {_scaling("bert")}
        tensorflow {_SAME_ORDER}
    """,
    "scaling-resnet": _scaling("resnet"),
    # The longest first.
    "trainings": "\n".join(
        f"{backend} {script} --runs {kind}"
        for script, kind, backend in itertools.product(
            _TRAININGS,
            ("half", "float32", "adaptive"),
            BACKENDS,
        )
    ),
}


def read_rows(name: str) -> list[list[str]]:
    """Return the rows of a preset or a file, each as a list of words.

    Args:
        name: A key of `PRESETS`, or the path of a text file.

    Raises:
        ValueError: If it is neither, or a row does not start with a backend.
    """
    if name not in PRESETS and not pathlib.Path(name).is_file():
        raise ValueError(
            f"`--rows` takes a file or one of {', '.join(PRESETS)}. "
            f"Received: {name!r}. Check the spelling."
        )
    text = PRESETS.get(name) or pathlib.Path(name).read_text()
    rows = [shlex.split(line, comments=True) for line in text.splitlines()]
    rows = [row for row in rows if row]
    for row in rows:
        if row[0] not in BACKENDS:
            raise ValueError(
                "A row is `BACKEND SCRIPT ARGUMENTS`, the backend one of tensorflow, "
                f"jax, torch. Received: {shlex.join(row)!r} in {name}. Mend the row."
            )
    return rows
