"""The README's commands are the ones that CI runs, and its code runs."""

import pathlib
import re

import keras
import numpy as np
import pytest

import keras_mixprec as mp

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

RANDOM = np.random.default_rng(0)
X = RANDOM.random((64, 8, 8, 1), dtype="float32")
Y = RANDOM.integers(0, 10, 64)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the saved model that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(X, Y, verbose=0)
    model.save("model.keras")
    return tmp_path


def test_two_commands_of_one_line():
    commands = blocks("bash")
    assert [c.count("\n") for c in commands] == [1, 1]
    quickstart, tests = commands
    assert quickstart.endswith("examples/quickstart.py\n")
    assert tests.endswith("pytest -q -n 2\n")
    assert (ROOT / "examples" / "quickstart.py").is_file()


def test_ci_finds_the_test_command():
    pattern = re.search(r"grep -E '([^']+)' README.md", (ROOT / ".ci/run").read_text())
    found = re.findall(f"{pattern[1]}.*$", README, re.MULTILINE)
    assert [f"{line}\n" for line in found] == blocks("bash")[1:]


def test_picture_is_there_and_small():
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert 0 < (ROOT / name).stat().st_size < 150_000


@pytest.mark.filterwarnings("ignore:Epoch .* overflowed:UserWarning")
def test_code_runs(folder):
    names = {"x": X, "y": Y}
    three_ways = blocks("python")
    assert len(three_ways) == 3
    for code in three_ways:
        exec(compile(code, "README.md", "exec"), names)
        assert names["model"].optimizer.loss_scale > 1
        # Each is a script of its own.
        mp.set_policy("float32")
    assert names["history"].history["overflow_total"][-1] >= 0
    assert (folder / "mixprec-report" / "report.html").is_file()
