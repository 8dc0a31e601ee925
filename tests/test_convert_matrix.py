"""The matrix: families of models, each compared with itself in float32.

The quick part takes a few cases of each kind; `-m matrix` takes all of them, on
TensorFlow, and every third on JAX and torch. keras_hub's are left out where it is not
installed.
"""

import importlib.util

import keras
import pytest
from conversion_cases import APPLICATIONS
from conversion_cases import CASES
from conversion_check import check
from conversion_hub import HUB
from conversion_layers import LAYERS
from conversion_layers import LEFT_OUT
from support import SLOW_ON_JAX

QUICK = [
    *(name for name in CASES if name.startswith("styles/")),
    "layers/AveragePooling3D",
    "layers/Bidirectional",
    "layers/GroupQueryAttention",
    "layers/SpectralNormalization",
    "applications/MobileNetV3Small",
]
QUICK_HUB = ["hub/LlamaBackbone", "hub/T5Backbone"]
# Whose products of float16 matrices with float32 sums JAX does not have on CPUs.
ATTENDS = ("Attention", "Block", "styles/", "hub/", "ConvNeXt")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*softmax over axis:UserWarning"),
    pytest.mark.filterwarnings("ignore:The initializer:UserWarning"),
    # keras_hub's own: T5 passes a mask to layers that take none, and Llama's output
    # embedding has no part in the backbone's outputs.
    pytest.mark.filterwarnings("ignore:Layer .* does not support masking:UserWarning"),
    pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning"),
]


def policy_for(name):
    on_jax = keras.config.backend() == "jax"
    attends = any(word in name for word in ATTENDS)
    return "mixed_bfloat16" if on_jax and attends else "mixed_float16"


def run_case(name):
    if name.startswith("hub/") and importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras_hub is not installed")
    outcome = check(name, policy_for(name))
    assert not outcome.failures, outcome
    assert outcome.layers > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=SLOW_ON_JAX if "applications" in name else ())
        for name in QUICK
    ],
)
def test_quick(name):
    run_case(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_HUB)
def test_quick_of_keras_hub(name):
    run_case(name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [n for n in CASES if n not in QUICK + QUICK_HUB])
def test_all(name):
    third = list(CASES).index(name) % 3 == 0
    if keras.config.backend() != "tensorflow" and not third:
        pytest.skip("every third case on this backend")
    run_case(name)


def test_every_layer_of_keras_is_in_the_matrix_or_has_a_reason_not_to_be():
    classes = {
        name: value
        for name, value in vars(keras.layers).items()
        if isinstance(value, type) and issubclass(value, keras.Layer)
    }
    named = {name for name, value in classes.items() if value.__name__ == name}
    assert named - LAYERS.keys() == LEFT_OUT.keys() & named
    assert len(LAYERS) >= 93


def test_the_matrix_is_as_wide_as_promised():
    assert len(HUB) >= 25
    assert {"T5Backbone", "SAMBackbone", "MiTBackbone"} < HUB.keys()
    assert {"LlamaBackbone", "GemmaBackbone"} < HUB.keys()
    modules = {getattr(keras.applications, n).__module__ for n in APPLICATIONS}
    families = {
        value.__module__
        for name, value in vars(keras.applications).items()
        if callable(value) and name[0].isupper()
    }
    assert modules == families
