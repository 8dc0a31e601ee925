"""Step time and peak memory on 1, 2, 4, ... devices of whatever there is.

    KERAS_BACKEND=tensorflow python scaling.py --devices 1 2 4 --out scaling.jsonl \\
        --plot scaling.png

TensorFlow: `MirroredStrategy`; JAX: `DataParallel`; torch: DistributedDataParallel, one
process for each device. GPUs where there are any, else logical CPU devices, which
share the same cores: good for correctness, not for speed. The batch is per device, so
that ideal scaling keeps the step time. Each number of devices and each way to scale
the loss has processes of its own, which see only as many GPUs. With `--check` the row
says whether the devices' copies of the weights have parted, and with our scaling an
overflow is then forced on each device in turn: one decision, every copy finite and as
it was, or the row says what else. `--deterministic` has TensorFlow add up an
embedding's rows in one order, which it does not do on a GPU otherwise.

TensorFlow runs without XLA on any number of devices, one included: it compiles for
one device alone, and like is to be compared with like. JAX always compiles, torch
never does here. JAX and torch have their batch on the device before the clock runs;
TensorFlow's comes from the host through `tf.data`, as `MirroredStrategy` wants it.
A row's `xla` says which; `batch` is per device, `samples_per_s` of all; memory in MiB,
`peak_memory_mb_each` of each device (without GPUs: of each process), before the check.

| `--scaling` | what is compiled |
|-|-|
| `none` | no loss scaling |
| `keras` | `keras.optimizers.LossScaleOptimizer` |
| `mp` | `keras_mixprec.LossScaleOptimizer` |
"""

import argparse
import json
import os
import pathlib
import socket
import sys

import scaling_job
from rows import add_turn
from rows import emit
from rows import wait_for_turn
from shapes import SHAPES
from shapes import SIZES

HERE = pathlib.Path(__file__).resolve().parent
WAYS = ("none", "keras", "mp")


def launch(devices: int, scaling: str, options: argparse.Namespace) -> dict:
    """Run one measurement in processes of its own. Returns its row.

    Args:
        devices: Int, how many.
        scaling: One of `WAYS`.
        options: Namespace of the command line.

    Raises:
        RuntimeError: If a process fails, with what it said, or time is up.
    """
    keys = ("model", "size", "batch", "steps", "blocks", "check", "wait_for_turn")
    job = {"devices": devices, "scaling": scaling}
    job |= {key: getattr(options, key) for key in keys}
    many = devices if os.environ.get("KERAS_BACKEND") == "torch" else 1
    command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(job)]
    port = _free_port()
    environments = [_environment(rank, many, port, devices) for rank in range(many)]
    if options.deterministic:
        environments = [env | {"TF_DETERMINISTIC_OPS": "1"} for env in environments]
    said = scaling_job.run(command, environments, options.timeout, wait_for_turn)
    lines = [line for line in said if line.startswith("{")]
    if not lines:
        raise RuntimeError(
            f"Expected a row from {devices} devices with scaling={scaling}. Received: "
            "nothing on standard output. Run `--worker` by hand."
        )
    return json.loads(lines[-1])


def _environment(rank, processes, port, devices):
    host = f"--xla_force_host_platform_device_count={devices}"
    paths = [str(HERE.parent), str(HERE), str(HERE.parent / "examples")]
    before = os.environ.get("PYTHONPATH")
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": _visible(devices),
        "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), host])),
        "PYTHONPATH": os.pathsep.join(paths + [before] if before else paths),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _visible(devices):
    # Engines take memory on every GPU that they see, also on one that nobody asked for.
    numbers = ",".join(map(str, range(devices)))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", numbers)
    return ",".join(seen.split(",")[:devices])


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Return the rows with `efficiency`: the step time on fewest devices over theirs.

    Of rows that are all of one number of devices there is none.

    Args:
        rows: List of rows of any ways of scaling.
    """
    if len({row["devices"] for row in rows}) == 1:
        return rows
    first = {}
    for row in sorted(rows, key=lambda r: r["devices"]):
        first.setdefault(row["scaling"], row["ms_per_step"])
    return [
        row | {"efficiency": round(first[row["scaling"]] / row["ms_per_step"], 3)}
        for row in rows
    ]


def plot(rows: list[dict], path: str) -> None:
    """Draw step time over devices, a line for each way of scaling, into a PNG.

    Args:
        rows: List of rows.
        path: Path of the picture.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way in WAYS:
        mine = sorted(
            (r["devices"], r["ms_per_step"]) for r in rows if r["scaling"] == way
        )
        if mine:
            axes.plot(*zip(*mine, strict=True), marker="o", label=way)
    axes.set(xlabel="devices", ylabel="ms per step, batch per device constant")
    counts = sorted({row["devices"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.set_ylim(bottom=0)
    what = (rows[0][key] for key in ("backend", "model", "size", "device"))
    axes.set_title(", ".join(what), size=8)
    axes.legend(title="loss scaling")
    figure.savefig(path, bbox_inches="tight")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="mlp")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, help="samples per device and step")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--scaling", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="force overflows too")
    parser.add_argument(
        "--deterministic", action="store_true", help="TensorFlow's ops that are so"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds per row")
    add_turn(parser)
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    parser.add_argument("--plot", help="draw them into this .png file")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.wait_for_turn and len(options.devices) * len(options.scaling) > 1:
        parser.error(
            "--wait-for-turn is one row's: give one number of --devices and one "
            f"--scaling. Received: {options.devices} and {options.scaling}."
        )
    if options.deterministic and os.environ.get("KERAS_BACKEND") != "tensorflow":
        parser.error(
            "--deterministic is about TensorFlow's operations. Received: "
            f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND')}. Leave the option out."
        )
    return options


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.worker:
        from scaling_worker import work

        work(options.worker)
        return
    rows = [launch(n, way, options) for n in options.devices for way in options.scaling]
    rows = with_efficiency(rows)
    for row in rows:
        emit(row, options.out)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
