"""Every example at its small size, as a process of its own, in under two minutes."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# The quickstart has a test file, and `digits` is what the loops import.
HELPERS = ("quickstart", "digits")
# Several processes each: `test_processes.py` runs them and kills what hangs.
PROCESSES = (
    "chief",
    "jax_processes",
    "tensorflow_parameter_server",
    "tensorflow_workers",
    "torch_ddp",
)
SCRIPTS = sorted(
    p for p in EXAMPLES.glob("*.py") if p.stem not in (*HELPERS, *PROCESSES)
)
BACKENDS = {
    "gan": ("tensorflow", "torch"),
    "loop_jax": ("jax",),
    "loop_torch": ("torch",),
    "loop_tensorflow": ("tensorflow",),
    "multi_device": ("tensorflow", "jax"),
}
NEEDS = {"bert": "keras_hub"}
# Two, with both cores to itself; the tests run two at a time.
MINUTES = 4


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_says_how_to_run_it_and_what_is_new(path):
    text = path.read_text(encoding="utf-8")
    assert f"python examples/{path.name}" in text.split('"""')[1]
    marked = [line for line in text.splitlines() if "# mixed precision" in line]
    assert any("import keras_mixprec as mp" in line for line in marked)
    assert len(marked) >= 3
    unmarked = [
        line
        for line in text.splitlines()
        if re.search(r"\bmp\.", line) and line not in marked
    ]
    assert unmarked == []
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert '"--full"' in text


@pytest.mark.parametrize("name", PROCESSES)
def test_example_of_several_processes_is_listed(name):
    assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert '"--full"' in text or name == "chief"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_holds_what_it_says(path, tmp_path):
    backend = keras.backend.backend()
    if backend not in BACKENDS.get(path.stem, ("tensorflow", "jax", "torch")):
        pytest.skip(f"not for {backend}")
    if path.stem in NEEDS and not importlib.util.find_spec(NEEDS[path.stem]):
        pytest.skip(f"needs {NEEDS[path.stem]}")
    words = []
    if path.stem == "bert" and backend == "jax":
        # JAX has no float16 attention on CPUs.
        words = ["--policy", "mixed_bfloat16"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(path), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
