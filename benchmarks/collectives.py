"""What one decision over all replicas costs: on paper, and between local processes.

    python collectives.py                       # the table for 8 to 8192 replicas
    python collectives.py --measure 2 4 8       # and the model held against gloo

Three ways to agree: an all-reduce of one scalar of its own; the scalar appended to the
gradients' all-reduce; or nothing, where the decision is read off the reduced gradients,
as this library does. The second and third are one all-reduce, as without loss scaling.

`--measure` puts loopback's figures in place of NCCL's: a process that agrees with
itself gives the base, a ping-pong between two the hop. What the model says of 2, 4 and
8 processes is then a prediction, none of them fitted, and the rows have it beside what
was measured. Prints JSON lines; needs torch for `--measure`. It asserts nothing.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import signal
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
    Volta and Ampere GPUs are what that file knows; `LATER` has one's that knows Hopper.
    """

    tree: tuple[float, float, float] = (4.4, 0.52, 5.0)
    ring: tuple[float, float, float] = (3.6, 0.47, 2.7)
    per_host: int = 8
    slower: float = 1.8


# The same file at commit b647562; the network's own latency, which it adds, left out.
LATER = Links(tree=(6.8, 0.6, 5.0), ring=(6.6, 0.6, 2.7), slower=1.0)


def scalar_all_reduce(replicas: int, links: Links = Links()) -> float:
    """Return the microseconds of an all-reduce of one scalar.

        tree: base + 2 ((per_host - 1) inside + log2(hosts) between)
        ring: base + 2 ((replicas - hosts) inside + (hosts - 1) between)

    with `slower` times `inside` where there are several hosts.

    Source: `ncclTopoTuneModel` in the file that `Links` names.

    Args:
        replicas: Int, GPUs.
        links: `Links`. Defaults to NCCL's own figures.
    """
    hosts = math.ceil(replicas / links.per_host)
    slower = links.slower if hosts > 1 else 1.0
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
        "own_all_reduce_later_us": round(scalar_all_reduce(replicas, LATER), 1),
        "appended_us": round(appended(), 5),
        "read_off_the_sum_us": 0.0,
        "step_ms": step_ms,
    }


def loopback(base: float, hop: float) -> Links:
    """Return the links of processes on one host, however many they are.

    gloo's default is a ring (pytorch/gloo, `gloo/allreduce.cc`, commit 0fdde35). A
    scalar is one segment of it: it passes `replicas - 1` hops while it is added up and
    as many while it is handed out, the form of NCCL's ring within one host.

    Args:
        base: Float, microseconds of an all-reduce in a group of one.
        hop: Float, microseconds from one process to another.
    """
    figures = (base, hop, hop)
    return Links(tree=figures, ring=figures, per_host=sys.maxsize)


def spans(starts: list[list[float]], ends: list[list[float]]) -> list[float]:
    """Return each call's seconds, from the last process that calls to the last served.

    One process's own clock says less: the first in gloo's ring is done half-way.

    Args:
        starts: For each process a list of floats, seconds of one clock for all.
        ends: The same, of when its calls returned.
    """
    every = zip(zip(*starts, strict=True), zip(*ends, strict=True), strict=True)
    return [max(ended) - max(began) for began, ended in every]


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
    """Be one process of `measure`: time three ways to agree."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    scalar, grads = torch.zeros(1), torch.zeros(elements)
    longer = torch.zeros(elements + 1)
    ways = {
        "scalar": lambda: dist.all_reduce(scalar),
        "round_trip": lambda: _round_trip(dist, scalar),
        "gradients": lambda: dist.all_reduce(grads),
        "gradients_then_scalar": lambda: (dist.all_reduce(grads), ways["scalar"]()),
        "gradients_and_scalar": lambda: dist.all_reduce(longer),
    }
    if dist.get_world_size() != 2:
        del ways["round_trip"]
    # One way after the other: a process that has just worked hard has to let others
    # have the core, so that a scalar between gradients measures the scheduler.
    seen = {name: _calls(way, dist.barrier, repeats) for name, way in ways.items()}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, seen)
    if dist.get_rank() == 0:
        for name in ways:
            starts, ends, queued = zip(*(own[name] for own in everywhere), strict=True)
            us = [1e6 * span for span in spans(starts, ends)]
            print(name, statistics.median(us))
            print(f"{name}_quarter", statistics.quantiles(us, n=4)[0])
            print(f"{name}_queued", statistics.mean(queued))
    dist.destroy_process_group()


def _calls(way, barrier, repeats):
    """Return when each call began and ended, and the microseconds queued per call."""
    for _ in range(3):
        way()
    starts, ends, before = [], [], _queued()
    for _ in range(repeats):
        barrier()
        starts.append(time.perf_counter())
        way()
        ends.append(time.perf_counter())
    return starts, ends, (_queued() - before) / repeats


def _round_trip(dist, tensor):
    first, other = dist.get_rank() == 0, 1 - dist.get_rank()
    for call in (dist.send, dist.recv) if first else (dist.recv, dist.send):
        call(tensor, other)


def _queued():
    """Return the microseconds that this process's threads have waited for a core.

    NaN where the system does not say. Source: Linux,
    Documentation/scheduler/sched-stats.rst.
    """
    files = [*pathlib.Path("/proc/self/task").glob("*/schedstat")]
    if not files:
        return math.nan
    return sum(int(path.read_text().split()[1]) for path in files) / 1000


def compare(
    counts: list[int], elements: int, repeats: int, jobs: int, out: str | None
) -> None:
    """Write a row for each number of processes: predicted beside measured.

    Args:
        counts: List of ints, processes.
        elements: Int, float32 gradients.
        repeats: Int, calls of each way in a job.
        jobs: Int, jobs of each number, in turn; the rows have their medians.
        out: Path of a `.jsonl` file, or `None`.
    """
    import torch

    found = {n: [] for n in (1, 2, *counts)}
    for _ in range(jobs):
        for n, rows in found.items():
            rows.append(measure(n, elements, repeats))
    base = statistics.median(row["scalar_quarter"] for row in found[1])
    hop = statistics.median(row["round_trip_quarter"] / 2 for row in found[2])
    alone = statistics.median(row["scalar_queued"] for row in found[1])
    fixed = {"elements": elements, "base": base, "hop": hop, "alone_queued": alone}
    where = place(None, {"torch": torch.__version__})
    for n in counts:
        row = {"processes": n} | fixed
        row |= against_model(found[n], scalar_all_reduce(n, loopback(base, hop)))
        row = {k: round(v, 1) for k, v in row.items()}
        emit(row | {"unit": "us", "repeats": repeats, "jobs": jobs} | where, out)


def against_model(jobs: list[dict[str, float]], predicted: float) -> dict[str, float]:
    """Return the medians of some jobs, and how far from the prediction they are.

    The prediction knows no other work on the cores, so that it is held against the
    fastest quarter of the calls, of which base and hop are too.

    Args:
        jobs: List of what `measure` returned for one number of processes.
        predicted: Float, microseconds of a scalar's all-reduce.
    """
    names = ("scalar", "gradients", "gradients_then_scalar", "gradients_and_scalar")
    names += ("scalar_quarter", "scalar_queued", "gradients_queued")
    medians = {name: statistics.median(job[name] for job in jobs) for name in names}
    quarters = [job["scalar_quarter"] for job in jobs]
    return {
        "predicted_scalar": predicted,
        "residual_scalar": medians["scalar_quarter"] - predicted,
        "scalar_quarter_min": min(quarters),
        "scalar_quarter_max": max(quarters),
    } | medians


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64, 1024, 8192])
    parser.add_argument("--step-ms", type=float, default=16.8)
    parser.add_argument("--measure", type=int, nargs="*", default=[])
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=5, help="of each number, in turn")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    # As an exception, so that a run that is told to end ends its workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    for replicas in options.replicas:
        emit(predict(replicas, options.step_ms))
    if options.measure:
        sizes = options.elements, options.repeats, options.jobs
        compare(options.measure, *sizes, options.out)


if __name__ == "__main__":
    main()
