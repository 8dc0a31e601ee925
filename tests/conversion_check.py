"""What every converted model has to fulfil, measured on one case."""

import dataclasses
import os
import tempfile

import keras
import numpy as np
from conversion_cases import CASES
from conversion_inputs import sample_for

import keras_mixprec as mp
from keras_mixprec.convert import convert
from keras_mixprec.convert import to_float32
from keras_mixprec.plan import plan

LARGEST_ERROR = 2e-2
HALVINGS = 29  # From 2**15 down to 2**-14, the bounds of the loss scale.


@dataclasses.dataclass
class Outcome:
    """What one case showed.

    Args:
        name: Of the case.
        layers: Number of layers.
        half: Number of layers in half precision.
        error: Largest relative error of an output against float32.
        loss_scale: Power of two at which gradients were finite.
        reloads: Whether Keras can save and load the float32 model at all.
        reasons: Reasons for float32 other than "input", with the number of layers.
        failures: What was not as it should be.
    """

    name: str
    layers: int = 0
    half: int = 0
    error: float = 0.0
    loss_scale: int | None = None
    reloads: bool = True
    reasons: dict = dataclasses.field(default_factory=dict)
    failures: list = dataclasses.field(default_factory=list)


def check(name: str, policy: str = "mixed_float16", train: bool = True) -> Outcome:
    """Convert the model of a case, and compare it with what it was."""
    keras.utils.set_random_seed(0)
    outcome = Outcome(name)
    model = CASES[name]()
    x = sample_for(model)
    wanted, weights = run(model, x), model.get_weights()
    outcome.reloads = _can_reload(model)
    convert(model, policy, sample=x)
    _note_plan(outcome, plan(model, policy))
    got = run(model, x)
    outcome.error = max(map(relative_error, got, wanted))
    expect = _expectation(outcome)
    expect(outcome.error < LARGEST_ERROR, f"error {outcome.error:.1e}")
    expect(all(np.isfinite(y).all() for y in got), "not finite")
    floats = [y for y in got if y.dtype.kind == "f"]
    expect(all(y.dtype == "float32" for y in floats), "outputs are not float32")
    expect(equal(model.get_weights(), weights), "weights changed")
    if outcome.reloads:
        loaded = reload(model)
        expect(policies(loaded) == policies(model), "loaded in other precisions")
        expect(equal(run(loaded, x), got), "loaded with other outputs")
    if train:
        outcome.loss_scale = finite_gradient_scale(model, x)
        expect(outcome.loss_scale is not None, "no finite gradients")
    model.set_weights(weights)  # A training step moves BatchNormalization statistics.
    to_float32(model)
    expect(equal(run(model, x), wanted), "to_float32 is not exact")
    return outcome


def _expectation(outcome):
    def expect(holds, message):
        if not holds:
            outcome.failures.append(message)

    return expect


def _note_plan(outcome, made):
    outcome.layers = len(made)
    outcome.half = sum(row.policy.startswith("mixed_") for row in made)
    for row in made:
        if row.policy == "float32" and row.reason != "input":
            outcome.reasons[row.reason] = outcome.reasons.get(row.reason, 0) + 1


def _can_reload(model) -> bool:
    try:
        reload(model)
    except Exception:  # Layers shared across nested models, for one.
        return False
    return True


def reload(model):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        return keras.saving.load_model(path)


def run(model, x) -> list:
    outputs = keras.tree.flatten(model(x, training=False))
    return [np.asarray(keras.ops.convert_to_numpy(y)) for y in outputs]


def equal(some, others) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def relative_error(got, wanted) -> float:
    largest = np.abs(wanted).max() if wanted.size else 0.0
    difference = np.abs(got.astype("float64") - wanted).max() if wanted.size else 0.0
    return float(difference / largest) if largest else float(difference)


def policies(model) -> list:
    return [layer.dtype_policy.name for layer in model._flatten_layers()]


class Probe(keras.Model):
    """Trains a model on the mean square of all its outputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        return self.model(x)

    def compute_loss(self, x, y, y_pred, *args, **kwargs):
        outputs = [y for y in keras.tree.flatten(y_pred) if "float" in str(y.dtype)]
        return sum(keras.ops.mean(keras.ops.square(y)) for y in outputs)


def finite_gradient_scale(model, x) -> int | None:
    """Return the exponent of the first loss scale whose gradients are finite."""
    if not model.trainable_variables:
        return 0
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.0))
    probe = Probe(model)
    eager = keras.config.backend() != "jax"
    probe.compile(optimizer, run_eagerly=eager, jit_compile=False if eager else "auto")
    for halvings in range(HALVINGS + 1):
        probe.train_on_batch(x)
        if optimizer.overflow_count <= halvings:
            return 15 - halvings
    return None
