"""Run many benchmark rows, one process each; no row can stop the others.

    python run_matrix.py --rows tf-xla jax --out results
    python run_matrix.py --rows my_rows.txt
    python run_matrix.py --rows trainings --jobs 12 --out results/trainings

A row is one line of a text file, or of a preset below: `BACKEND SCRIPT ARGUMENTS`,
with `#` for comments. JSON lines go to OUT/NAME.jsonl as they come, NAME being the
preset or the file; what a failed row said last goes to OUT/NAME.failed.txt. Rows that
are timed run alone; others may share the machine with `--jobs`.
"""

import argparse
import itertools
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent

_BERT = "train_step.py --model bert"
_THREE = "--scaling none,keras,mp"
_BACKENDS = ("tensorflow", "jax", "torch")

# In the order of what matters most: a lent GPU may be gone before the end.
PRESETS = {
    "tf-xla": f"""
        tensorflow {_BERT} --xla {_THREE}
        tensorflow {_BERT} --xla --scaling none
        tensorflow {_BERT} --xla --scaling mp
        tensorflow {_BERT} --xla --scaling keras
        tensorflow {_BERT} --xla --scaling mp,mp+monitor --steps 100
    """,
    "tf-noxla": f"""
        tensorflow {_BERT} --no-xla {_THREE}
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
    # The longest first.
    "trainings": "\n".join(
        f"{backend} trainings.py --only {task} --runs {kind}"
        for task, kind, backend in itertools.product(
            ("transformer", "recommender", "cnn"),
            ("half", "float32", "adaptive"),
            _BACKENDS,
        )
    ),
}

# Processes that share one GPU take what they need of its memory, not all of it.
_SHARED = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "OMP_NUM_THREADS": "2",
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
        if row[0] not in _BACKENDS:
            raise ValueError(
                "A row is `BACKEND SCRIPT ARGUMENTS`, the backend one of tensorflow, "
                f"jax, torch. Received: {shlex.join(row)!r} in {name}. Mend the row."
            )
    return rows


def run_row(
    row: list[str], extra: list[str], timeout: float, keep: Callable, shared: bool
) -> str:
    """Run one row in a process of its own. Returns why it failed: empty if it did not.

    Args:
        row: Backend, script and arguments.
        extra: Arguments to add.
        timeout: Float, seconds.
        keep: Called with each of its JSON lines as it comes.
        shared: Whether other rows run beside it.
    """
    backend, script, *arguments = row
    root = str(HERE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = (_SHARED if shared else {}) | os.environ
    env |= {"KERAS_BACKEND": backend, "PYTHONPATH": path}
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    command = [sys.executable, str(HERE / script), *arguments, *extra]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith("{"):
                keep(line)
        process.wait()
        late = not timer.is_alive()
        timer.cancel()
        said.seek(0)
        tail = "\n".join(said.read().splitlines()[-12:])
    if late:
        return f"timeout after {timeout:g} s\n{tail}"
    return f"exit {process.returncode}\n{tail}" if process.returncode else ""


def run(name: str, options: argparse.Namespace, end: float) -> bool:
    """Run the rows of one preset or file. Returns whether all of them worked.

    Args:
        name: A key of `PRESETS`, or the path of a text file.
        options: Namespace of the command line.
        end: Seconds of `time.monotonic` after which no row starts.
    """
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    stem, lock = pathlib.Path(name).stem, threading.Lock()

    def write(kind, text):
        with lock, (out / f"{stem}{kind}").open("a") as f:
            f.write(text)
        print(text, end="", flush=True)

    def worked(row):
        left = end - time.monotonic()
        print("#", shlex.join(row), *options.extra, flush=True)
        if left < 5:
            failure = "not started: the time is up"
        else:
            failure = run_row(
                row,
                options.extra,
                min(options.timeout, left),
                lambda line: write(".jsonl", line),
                options.jobs > 1,
            )
        if failure:
            write(".failed.txt", f"{shlex.join(row)}\n{failure}\n\n")
        return not failure

    with ThreadPoolExecutor(options.jobs) as pool:
        return all([*pool.map(worked, read_rows(name))])


def main() -> int:
    """Run what the command line asks for. Returns 1 if a row failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", required=True, help="presets or files")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per row")
    parser.add_argument("--total", type=float, default=1e9, help="seconds in all")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    # What follows `--` goes to every row: `-- --size small --steps 2`.
    options, options.extra = parser.parse_known_args()
    options.extra = [word for word in options.extra if word != "--"]
    end = time.monotonic() + options.total
    worked = [run(name, options, end) for name in options.rows]
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
