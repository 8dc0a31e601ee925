"""`keras-mixprec launch`: a script cannot tell, but for its precision."""

import json
import os
import signal
import subprocess
import sys

import keras
import pytest
from processes import ROOT
from processes import search_path

from keras_mixprec_cli.launched import on_import

COMMAND = "import sys; from keras_mixprec_cli.app import main; sys.exit(main())"

SPEAKS = """
import os, signal, sys
print(__name__, __file__, sys.argv[1:], sys.path[0], "sitecustomize" in sys.modules)
print([m for m in ("keras", "keras_mixprec", "click") if m in sys.modules])
if "raise" in sys.argv:
    raise RuntimeError("mine")
if "exit" in sys.argv:
    sys.exit(7)
if "kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGTERM)
if "interrupt" in sys.argv:
    # Shells start background processes with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
"""

TRAINS = """
import os
os.environ["KERAS_BACKEND"] = {backend!r}
{imports}
import numpy as np
model = keras.Sequential(
    [keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(1, dtype="float32")]
)
model.compile("adam", "mse")
history = model.fit(np.zeros((8, 4)), np.zeros((8, 1)), verbose=0)
print(model.layers[0].compute_dtype, type(model.optimizer).__module__)
print(sorted(history.history))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SPEAKS)
    return path


def python(*words, **env):
    paths = search_path(ROOT)
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3", **env},
    )


def launch(*words, **env):
    return python("-c", COMMAND, "launch", *words, **env)


@pytest.mark.parametrize("word", ["nothing", "raise", "exit", "kill", "interrupt"])
def test_a_script_that_needs_no_keras_cannot_tell(script, word):
    plain = python(script, word, "--json", "--policy", "-h")
    launched = launch("--json", script, word, "--json", "--policy", "-h")
    for stream in ("stdout", "stderr", "returncode"):
        # Whether there is one at all is up to the machine.
        same = [getattr(done, stream) for done in (plain, launched)]
        if stream == "stdout":
            same = [text.replace("False\n", "True\n") for text in same]
        assert same[0] == same[1]
    status = {"raise": 1, "exit": 7, "kill": -signal.SIGTERM, "interrupt": -2}
    assert launched.returncode == status.get(word, 0)


def test_the_machines_sitecustomize_still_runs(script, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('the own one')")
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    done = launch(script, PYTHONPATH=paths)
    # Once for the command itself, once for the script.
    assert done.stdout.count("the own one") == 2
    assert done.returncode == 0, done.stderr


def imports(words="import keras"):
    return f"import torch\n{words}" if keras.backend.backend() == "torch" else words


@pytest.mark.parametrize(
    "words",
    [
        "import keras",
        "import importlib.util; importlib.util.find_spec('keras'); import keras",
        "import tensorflow as tf; keras = tf.keras",
    ],
    ids=["plain", "looked for first", "tf.keras"],
)
def test_the_script_chooses_the_backend_and_gets_the_policy(script, words):
    backend = keras.backend.backend()
    if "tf.keras" in words and backend != "tensorflow":
        pytest.skip("TensorFlow's name for it")
    script.write_text(TRAINS.format(backend=backend, imports=imports(words)))
    # The variable says what the script does not want.
    other = "jax" if backend == "tensorflow" else "tensorflow"
    done = launch("--json", script, KERAS_BACKEND=other)
    assert done.returncode == 0, done.stderr
    first, keys, *summary = done.stdout.splitlines()
    assert first == "float16 keras_mixprec.optimizer"
    assert "'loss_scale'" in keys
    found = json.loads("".join(summary))
    assert (found["policy"], found["backend"]) == ("mixed_float16", backend)
    (fit,) = found["fits"]
    assert fit["logs"]["loss_scale"] == 2.0**15


def test_finders_from_before_there_was_find_spec_are_passed_by(monkeypatch):
    ours = on_import._Finder({})
    monkeypatch.setattr(sys, "meta_path", [ours, object(), *sys.meta_path])
    assert ours.find_spec("keras").origin == keras.__file__


@pytest.mark.slow
def test_without_the_monitor_and_in_float32_it_is_plain_keras(script):
    backend = keras.backend.backend()
    script.write_text(TRAINS.format(backend=backend, imports=imports()))
    words = ("launch", "--no-monitor", "--policy", "float32", script)
    module = type(keras.optimizers.Adam()).__module__
    done = python("-m", "keras_mixprec", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        f"float32 {module}",
        "['loss']",
    ]
