"""What one decision over all replicas costs: on paper, and between local processes.

    python collectives.py                       # the table for 8 to 8192 replicas
    python collectives.py --measure 2 4 8       # and what gloo on loopback takes

Three ways to agree: an all-reduce of one scalar of its own; the scalar appended to the
gradients' all-reduce; or nothing, where the decision is read off the reduced gradients,
as this library does. The second and third are one all-reduce, as without loss scaling.
Prints JSON lines; needs torch for `--measure`. It asserts nothing.
"""

import argparse
import dataclasses
import math
import os
import socket
import statistics
import subprocess
import sys
import time

from rows import emit
from rows import place


@dataclasses.dataclass(frozen=True)
class Links:
    """Latencies in microseconds of an all-reduce of a few bytes.

    The form and the figures are those by which NCCL chooses its algorithm (NVIDIA,
    NCCL, `src/graph/tuning.cc`, `baseLat` and `hwLat` for the LL protocol, at commit
    01afd20): `base` per call, `inside` per hop over NVLink, `between` per hop over the
    network. Hops inside a host cost 1.8 times as much once there are several hosts.
    """

    tree: tuple[float, float, float] = (4.4, 0.52, 5.0)
    ring: tuple[float, float, float] = (3.6, 0.47, 2.7)
    per_host: int = 8


def scalar_all_reduce(replicas: int, links: Links = Links()) -> float:
    """Return the microseconds of an all-reduce of one scalar.

        tree: base + 2 ((per_host - 1) inside + log2(hosts) between)
        ring: base + 2 ((replicas - hosts) inside + (hosts - 1) between)

    Source: `ncclTopoTuneModel` in the file that `Links` names.

    Args:
        replicas: Int, GPUs.
        links: `Links`. Defaults to NCCL's own figures.
    """
    hosts = math.ceil(replicas / links.per_host)
    slower = 1.8 if hosts > 1 else 1.0
    base, inside, between = links.tree
    per_host = min(replicas, links.per_host)
    hops = (per_host - 1) * inside * slower + math.log2(hosts) * between
    tree = base + 2 * hops
    base, inside, between = links.ring
    ring = base + 2 * ((replicas - hosts) * inside * slower + (hosts - 1) * between)
    return min(tree, ring)


def appended(bytes_per_second: float = 50e9) -> float:
    """Return the microseconds of four more bytes in an all-reduce that is made anyway.

    A ring moves each byte twice past every link (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009).

    Args:
        bytes_per_second: Float, of the slowest link. Defaults to `50e9`: a 400 Gbit/s
            network port.
    """
    return 1e6 * 2 * 4 / bytes_per_second


def predict(replicas: int, step_ms: float) -> dict:
    """Return one row of the table.

    Args:
        replicas: Int, GPUs.
        step_ms: Float, milliseconds of a train step, to compare with.
    """
    alone = scalar_all_reduce(replicas)
    return {
        "replicas": replicas,
        "own_all_reduce_us": round(alone, 1),
        "own_all_reduce_percent": round(alone / step_ms / 10, 3),
        "appended_us": round(appended(), 5),
        "read_off_the_sum_us": 0.0,
        "step_ms": step_ms,
    }


def fit(measured: dict[int, float]) -> tuple[float, float]:
    """Return `(base, per_hop)` of `base + 2 log2(n) per_hop` through two points.

    Args:
        measured: Processes -> microseconds, for two numbers of processes.
    """
    (m, first), (n, second) = sorted(measured.items())
    per_hop = (second - first) / (2 * (math.log2(n) - math.log2(m)))
    return first - 2 * math.log2(m) * per_hop, per_hop


def measure(processes: int, elements: int, repeats: int) -> dict:
    """Return what one job of local processes measured: name -> microseconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, "--worker", str(elements), str(repeats)]
    started = []
    for rank in range(processes):
        cluster = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        extra = {k: str(v) for k, v in cluster.items()} | {"MASTER_ADDR": "127.0.0.1"}
        env = os.environ | extra | {"OMP_NUM_THREADS": "1"}
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        started.append(subprocess.Popen(command, env=env, stdout=out, text=True))
    try:
        lines = started[0].communicate(timeout=300)[0].splitlines()
    finally:
        for process in started:
            process.kill()
            process.wait()
    return {name: float(us) for name, us in (line.split() for line in lines)}


def work(elements: int, repeats: int) -> None:
    """Be one process of `measure`: time three ways to agree, in turn."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    scalar, grads = torch.zeros(1), torch.zeros(elements)
    longer = torch.zeros(elements + 1)
    ways = {
        "scalar": [scalar],
        "gradients": [grads],
        "gradients_then_scalar": [grads, scalar],
        "gradients_and_scalar": [longer],
    }
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 3):
        for name, tensors in ways.items():
            dist.barrier()
            start = time.perf_counter()
            for tensor in tensors:
                dist.all_reduce(tensor)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        for name, values in seconds.items():
            print(name, 1e6 * statistics.median(values))
    dist.destroy_process_group()


def compare(counts: list[int], elements: int, repeats: int, out: str | None) -> None:
    """Measure each number of processes; say what the smaller two predict for more."""
    import torch

    measured = {n: measure(n, elements, repeats) for n in counts}
    scalars = {n: m["scalar"] for n, m in measured.items()}
    two = dict(sorted(scalars.items())[:2])
    base, per_hop = fit(two) if len(two) == 2 else (math.nan, math.nan)
    where = place(None, {"torch": torch.__version__})
    for n, row in measured.items():
        rounded = {name: round(us, 1) for name, us in row.items()}
        predicted = round(base + 2 * math.log2(n) * per_hop, 1)
        fields = {"processes": n, "elements": elements, "predicted_scalar": predicted}
        emit(fields | rounded | {"unit": "us", "repeats": repeats} | where, out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64, 1024, 8192])
    parser.add_argument("--step-ms", type=float, default=16.8)
    parser.add_argument("--measure", type=int, nargs="*", default=[])
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    for replicas in options.replicas:
        emit(predict(replicas, options.step_ms))
    if options.measure:
        compare(options.measure, options.elements, options.repeats, options.out)


if __name__ == "__main__":
    main()
