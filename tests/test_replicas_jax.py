"""keras.distribution on JAX: eight host devices, data- and model-parallel."""

import keras
import pytest
from processes import run

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX")
SCRIPT = "tests/distributed/jax_devices.py"
EIGHT = [{"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}]


@pytest.mark.parametrize(
    "kind, inner",
    [
        ("model", "most"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("data", "plain"), ("data", "most"), ("model", "plain"))
        ),
    ],
)
def test_training_survives_faults_on_each_device(kind, inner):
    (output,) = run(SCRIPT, [["survive", kind, inner]], EIGHT, deadline=300)
    assert "survived" in output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "model"])
def test_eight_devices_learn_as_one_does(kind):
    inners = ["plain", "accumulation", "averaging", "global_clipnorm", "all"]
    (output,) = run(SCRIPT, [["curves", kind, *inners]], EIGHT, deadline=300)
    assert output.count("same curve") == len(inners)
    assert "same in half precision" in output


@pytest.mark.parametrize(
    "kind", [pytest.param("data", marks=pytest.mark.slow), "model"]
)
def test_the_decision_costs_no_more_than_a_few_numbers(kind):
    run(SCRIPT, [["collectives", kind]], EIGHT, deadline=200)


@pytest.mark.parametrize(
    "kind", [pytest.param("data", marks=pytest.mark.slow), "model"]
)
def test_a_variable_without_a_gradient_is_left_alone(kind):
    (output,) = run(SCRIPT, [["missing", kind]], EIGHT, deadline=120)
    assert output.count("stepped and skipped") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "model"])
def test_looking_at_steps_compiles_one_more_step_and_not_one_for_each(kind):
    (output,) = run(SCRIPT, [["inspected", kind]], EIGHT, deadline=120)
    assert "compiled once" in output
