"""Every test starts from the same seed and policy, and leaves no hook behind."""

import os
import pathlib
import sys

# What the processes of several devices share with the tests that start them.
sys.path.append(str(pathlib.Path(__file__).parent / "distributed"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# On models this small torch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("KERAS_BACKEND") == "torch":
    # Imported after TensorFlow in one process, torch may segfault.
    import torch  # noqa: F401

import keras  # noqa: E402
import pytest  # noqa: E402

import keras_mixprec as mp  # noqa: E402
from keras_mixprec import compile_hook  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_keras():
    """Begin each test with seed 0, names counted from zero and policy float32."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    # Some tests look at Keras without it.
    compile_hook.put()
    yield
    mp.set_policy("float32")
