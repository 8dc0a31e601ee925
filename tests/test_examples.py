"""Every example at its small size, as a process of its own, in under two minutes."""

import importlib.util
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from processes import ROOT
from processes import search_path

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
# Until it hangs: each takes under two with both cores to itself, but on a busy machine.
MINUTES = 10


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


class _Reached(Exception):
    """`fit` was called: nothing is trained here."""


@pytest.fixture
def full_size(monkeypatch):
    """Run an example with `--full` up to `fit`. Returns model, x, y, batch size."""
    reached = {}

    def fit(model, x=None, y=None, batch_size=None, **_):
        reached.update(model=model, x=x, y=y, batch_size=batch_size)
        raise _Reached

    def run(name, *words, **replaced):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.syspath_prepend(EXAMPLES)
        module = importlib.import_module(name)
        for attribute, value in replaced.items():
            monkeypatch.setattr(module, attribute, value)
        # KerasHub's tasks have a `fit` of their own.
        hub = getattr(module, "keras_hub", None)
        owner = hub.models.BertTextClassifier if hub else keras.Model
        monkeypatch.setattr(owner, "fit", fit)
        with pytest.raises(_Reached):
            module.main(["--full", *words])
        return reached

    return run


def few_digits(*_):
    """As scikit-learn's, but four: the full size of all is a gigabyte."""
    return np.zeros((4, 8, 8, 1), "float32"), np.zeros(4, "int64")


def test_full_size_needs_neither_network_nor_files(full_size):
    """What is trained there has the sizes that are promised, and takes the data."""
    found = full_size("resnet", digits=lambda: few_digits() * 2)
    assert len(found["model"].layers[-2].layers) == 176  # Of ResNet-50.
    takes(found, (4, 224, 224, 3), (4, 10))
    found = full_size("fine_tune", "--weights", "none", digits=few_digits)
    takes(found, (4, 224, 224, 3), (4, 5))


@pytest.mark.slow
def test_full_size_of_bert(full_size):
    reviews = (["a great film"] * 10, np.zeros(10, "int64"))
    found = full_size("bert", made_up_reviews=lambda *_: reviews)
    assert found["x"]["token_ids"].shape == (8, 128)
    # As published, without the head that it was trained with.
    assert found["model"].backbone.count_params() == 109_482_240


def takes(found, inputs, outputs):
    assert found["x"].shape == inputs
    assert len(found["y"]) == len(found["x"])
    assert found["x"].max() <= 255
    batch = keras.KerasTensor(found["x"].shape, dtype="float32")
    assert found["model"].compute_output_spec(batch).shape == outputs


def test_made_up_ratings_can_be_learned_at_any_size(monkeypatch):
    """Of most unseen pairs both ids were met in training, as of real ones."""
    monkeypatch.syspath_prepend(EXAMPLES)
    recommender = importlib.import_module("recommender")
    for users, items, count in ((400, 800, 40_000), (10_000, 100_000, 320_000)):
        ids, liked = recommender.made_up_ratings(users, items, count)
        assert 0.5 < liked.mean() < 0.7
        known = []
        for name, size in (("user", users), ("item", items)):
            assert 0 <= ids[name].min() <= ids[name].max() < size
            met = np.bincount(ids[name][count // 5 :], minlength=size)
            known.append(met[ids[name][: count // 5]] >= 5)
        assert np.mean(known[0] & known[1]) > 0.6


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
    done = subprocess.run(
        [sys.executable, str(path), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        env={**os.environ, "PYTHONPATH": search_path(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
