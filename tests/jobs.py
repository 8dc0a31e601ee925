"""How each engine's processes find each other, on loopback."""

import json

import keras
from processes import Processes
from processes import free_ports
from processes import run

BACKEND = keras.backend.backend()
EXAMPLES = {
    "tensorflow": "examples/tensorflow_workers.py",
    "jax": "examples/jax_processes.py",
    "torch": "examples/torch_ddp.py",
}
SCRIPTS = {
    "tensorflow": "tests/distributed/workers.py",
    "jax": "tests/distributed/jax_devices.py",
    "torch": "tests/distributed/torch_processes.py",
}


def job(number, *arguments, deadline=300):
    """Return the `Processes` of this backend's engine, not yet started.

    Args:
        number: Int, how many.
        arguments: Those of the engine's script.
        deadline: Float, seconds. Defaults to 300.
    """
    return Processes(*_specification(number, arguments), deadline=deadline)


def run_job(number, *arguments, deadline=300):
    """Run the job to its end. Returns the output of each process."""
    return run(*_specification(number, arguments), deadline=deadline)


def run_example(number, deadline=300):
    """Run this backend's example at its small size. Returns each process's output."""
    ports = free_ports(number)
    each = [[] for _ in range(number)]
    if BACKEND == "jax":
        cluster = ["--coordinator", f"127.0.0.1:{ports[0]}", "--processes", number]
        each = [[*cluster, "--index", i] for i in range(number)]
    environments = [_environment(i, ports) for i in range(number)]
    return run(EXAMPLES[BACKEND], each, environments, deadline)


def _specification(number, arguments):
    ports = free_ports(number)
    each = [list(arguments) for _ in range(number)]
    if BACKEND == "jax":
        each = [[*arguments, ports[0], number, i] for i in range(number)]
    environments = [_environment(i, ports) for i in range(number)]
    return SCRIPTS[BACKEND], each, environments


def _environment(index, ports):
    if BACKEND == "torch":
        return {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(len(ports)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(ports[0]),
        }
    cluster = {"worker": [f"127.0.0.1:{p}" for p in ports]}
    task = {"type": "worker", "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


def words(output, name):
    """Return what follows `name` in each line that begins with it."""
    lines = [line.split() for line in output.splitlines()]
    return [line[1:] for line in lines if line[:1] == [name]]
