"""One measured row, and where it was measured."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys


def place(device: str | None, versions: dict[str, str | None]) -> dict:
    """Return the device, the versions, the date and the run of a row.

    The run is what the environment variable `RUN` says, `None` without it.

    Args:
        device: The accelerator's name, `None` for the CPU.
        versions: Package -> version; those that are `None` are left out.
    """
    versions = {"python": platform.python_version()} | versions
    return {
        "device": device or cpu_name(),
        "versions": {name: v for name, v in versions.items() if v},
        "date": datetime.date.today().isoformat(),
        "run": os.environ.get("RUN"),
    }


def cpu_name() -> str:
    """Return the CPU's name and the number of cores this process may use."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [n.split(":", 1)[1].strip() for n in lines if n.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU {name}, {_cores()} cores"


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def summary(seconds: list[float], steps: int, batch: int) -> dict:
    """Return the timing fields of a row.

    Args:
        seconds: List of floats, one per timed block.
        steps: Int, steps in a block.
        batch: Int, samples in a step.
    """
    per_step = [1000 * s / steps for s in seconds]
    median = statistics.median(per_step)
    return {
        "ms_per_step": round(median, 4),
        "ms_min": round(min(per_step), 4),
        "ms_max": round(max(per_step), 4),
        "blocks": len(per_step),
        "steps_per_block": steps,
        "samples_per_s": round(1000 * batch / median, 1),
    }


def peak_memory(devices: dict[str, tuple[float, float]]) -> dict:
    """Return the peak-memory fields of a row.

    Args:
        devices: Device -> (MiB in use, MiB at the peak); empty without accelerator,
            where the process's own peak stands in.
    """
    if devices:
        peak, where = sum(peak for _, peak in devices.values()), "device"
    else:
        peak, where = host_peak(), "host"
    return {"peak_memory_mb": round(peak, 1), "memory_of": where}


def host_peak() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere (getrusage(2)).
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def wait_for_turn(wanted: bool = True) -> None:
    """Say that all is compiled, and wait until nobody compiles or is timed any more.

    Prints `ready` and takes a line from standard input for the go-ahead, which
    `run_matrix.py --together` gives.

    Args:
        wanted: Whether to wait. Defaults to `True`.

    Raises:
        RuntimeError: If the input ends: whoever would answer is gone.
    """
    if not wanted:
        return
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise RuntimeError(
            "Expected a line on standard input, the go-ahead. Received: its end. Run "
            "under `run_matrix.py --together`, or leave `--wait-for-turn` out."
        )


def add_turn(parser: argparse.ArgumentParser) -> None:
    """Add `--wait-for-turn` to a script's options.

    Args:
        parser: The script's `argparse.ArgumentParser`.
    """
    parser.add_argument(
        "--wait-for-turn",
        action="store_true",
        help="compiled, print `ready` and wait for a line on standard input",
    )


def emit(row: dict, path: str | None = None) -> None:
    """Print a row as one JSON line, and append it to a file.

    Args:
        row: What was measured.
        path: Path of a `.jsonl` file. Defaults to none.
    """
    line = json.dumps(row)
    print(line, flush=True)
    if path:
        file = pathlib.Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as f:
            f.write(line + "\n")
