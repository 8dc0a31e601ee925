"""Run many benchmark rows, one process each; no row can stop the others.

    python run_matrix.py --rows tf-xla jax --out results
    python run_matrix.py --rows my_rows.txt
    python run_matrix.py --rows scaling --jobs 6 --together
    python run_matrix.py --rows trainings --jobs 12 --out results/trainings

A row is one line of a text file, or of a preset of `presets.py`: `BACKEND SCRIPT
ARGUMENTS`, with `#` for comments. JSON lines go to OUT/NAME.jsonl as they come, NAME
being the preset or the file; what a failed row said last goes to OUT/NAME.failed.txt.

Rows that are timed run alone: one at a time, or with `--together`, where `--jobs` of
them compile side by side and are then timed one after the other, when none compiles
any more (`turns.py`). Each gets `--wait-for-turn`, says `ready` on its standard output
and waits for a line on its input (`rows.wait_for_turn`); a script without that option
fails at once. `--timeout` counts a row's own seconds, not those in which it waits;
`--total` counts all. Other rows, such as trainings, may share the machine by `--jobs`
alone. Rows that share a GPU take its memory bit by bit: `--jobs` of them have to fit.
"""

import argparse
import functools
import pathlib
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from presets import BACKENDS
from presets import PRESETS  # noqa: F401 - what `--rows` takes
from presets import read_rows
from row_process import Lease
from row_process import ended_by_signal
from row_process import run_row
from turns import Turns

HERE = pathlib.Path(__file__).resolve().parent


def run(name: str, options: argparse.Namespace, lease: Lease) -> bool:
    """Run the rows of one preset or file. Returns whether all of them worked.

    Args:
        name: A key of `PRESETS`, or the path of a text file.
        options: Namespace of the command line.
        lease: The `Lease` after whose end no row starts or goes on.
    """
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    stem, lock = pathlib.Path(name).stem, threading.Lock()

    def write(kind, text):
        with lock, (out / f"{stem}{kind}").open("a") as f:
            f.write(text)
        print(text, end="", flush=True)

    def worked(number, row):
        turns.start(number)
        try:
            failure = _run(row, number)
        finally:
            turns.end(number)
        if failure:
            write(".failed.txt", f"{shlex.join(row)}\n{failure}\n\n")
        return not failure

    def _run(row, number):
        print(f"# {shlex.join([*row, *options.extra])}\n", end="", flush=True)
        if lease.left() < 5:
            return "not started: the time is up"
        return run_row(
            row,
            options.extra,
            options.timeout,
            lease,
            lambda line: write(".jsonl", line),
            shared=options.jobs > 1,
            turn=functools.partial(turns.wait, number) if options.together else None,
        )

    rows = [row for row in read_rows(name) if row[0] in options.backends]
    turns = Turns(options.jobs, len(rows))
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            return all([*pool.map(worked, range(len(rows)), rows)])
        except BaseException:
            lease.stop()
            raise


def main() -> int:
    """Run what the command line asks for. Returns 1 if a row failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", required=True, help="presets or files")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="of which"
    )
    parser.add_argument("--out", default=str(HERE / "results"), help="folder")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per row")
    parser.add_argument("--total", type=float, default=1e6, help="seconds in all")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument(
        "--together", action="store_true", help="compile at once, be timed in turn"
    )
    # What follows `--` goes to every row: `-- --size small --steps 2`.
    options, options.extra = parser.parse_known_args()
    options.extra = [word for word in options.extra if word != "--"]
    lease = Lease(options.total)
    with ended_by_signal():
        worked = [run(name, options, lease) for name in options.rows]
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
