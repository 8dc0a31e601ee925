"""Where overflows began: the right layer or the loss, and exact counts."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_mixprec as mp
from keras_mixprec.attribution import Attribution
from keras_mixprec.attribution import attribute
from keras_mixprec.attribution import read_counters
from keras_mixprec.diagnosis import describe
from keras_mixprec.diagnosis import keep_float32

HALF = "mixed_float16"
# Of a loss whose gradient is 1: harmless; beyond float16 behind `loud`, whose own
# factor is 2**10, but not before it; beyond float16 from the loss on.
SMALL, LARGE, HUGE = 2.0**2, 2.0**8, 2.0**17


class Loud(keras.layers.Layer):
    """Multiplies by 1024, forward and backward."""

    def call(self, x):
        return x * 1024.0


def dense(units, name, spread, **arguments):
    return keras.layers.Dense(
        units,
        name=name,
        kernel_initializer=keras.initializers.Constant(spread),
        **{"dtype": HALF, **arguments},
    )


def model_with(head=HALF, train_step=None):
    layers = [
        keras.Input((4,)),
        dense(4, "first", 0.25),
        dense(4, "second", 2.0**-12),
        Loud(name="loud", dtype=HALF),
        dense(2, "head", 1.0, dtype=head),
    ]
    kind = keras.Sequential if train_step is None else train_step
    model = kind(layers, name="net")
    rule = {"growth_factor": 1.0, "backoff_factor": 1.0}
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.0), 1.0, **rule)
    model.compile(optimizer, product_loss)
    return model


def product_loss(y_true, y_pred):
    """A loss whose gradient is `y_true`, the same for every prediction."""
    return ops.sum(y_true * y_pred, axis=-1)


class Scales(keras.callbacks.Callback):
    """Sets the loss scale before each epoch, if asked to; attributes after it."""

    def __init__(self, scales):
        super().__init__()
        self.scales, self.found = scales, []

    def on_epoch_begin(self, epoch, logs=None):
        # On JAX asking for the model brings its variables up to date.
        optimizer = self.model.optimizer
        if self.scales[epoch] is not None:
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
            optimizer.dynamic_scale.assign(self.scales[epoch])
        self.before = read_counters([optimizer])

    def on_epoch_end(self, epoch, logs=None):
        since = read_counters([self.model.optimizer]) - self.before
        self.found.append(attribute(self.model, since))


def train(model, scales, bad=(), batches=4, callbacks=()):
    """Train on batches of one, those in `bad` out of float16's range; one epoch each
    of the loss scales. Return what each epoch's overflows are attributed to."""
    x, y = np.ones((batches, 4), "float32"), np.ones((batches, 2), "float32")
    x[list(bad)] = 1e6
    callback = Scales(scales)
    fit = {"batch_size": 1, "shuffle": False, "verbose": 0}
    fit["callbacks"] = [callback, *callbacks]
    with warnings.catch_warnings():
        # An epoch that was skipped whole warns by itself.
        warnings.filterwarnings("ignore", message="Epoch .* steps overflowed")
        model.fit(x, y, epochs=len(scales), **fit)
    return callback.found


@pytest.fixture(scope="module", params=[HALF, "float32"])
def found(request):
    """One training of each kind: per epoch, what is attributed."""
    model = model_with(request.param)
    return request.param, train(model, [SMALL, LARGE, HUGE, LARGE], bad=[2])


def test_a_bad_batch_is_put_down_to_the_loss(found):
    assert found[1][0].nonfinite_loss == 1
    assert found[1][0].began == {}
    assert found[1][0].spread == {"head": 1, "second": 1, "first": 1}


def test_gradients_that_overflow_between_layers_are_put_down_to_the_layer(found):
    for epoch in (1, 3):
        assert found[1][epoch].nonfinite_loss == 1
        assert found[1][epoch].began == {"second": 3}
        assert found[1][epoch].spread == {"head": 1, "second": 4, "first": 4}


def test_a_float16_output_layer_is_told_from_a_loss_that_is_not_finite(found):
    head, epochs = found
    assert epochs[2].nonfinite_loss == 1
    # In float32 it holds what float16 cannot.
    assert epochs[2].began == ({"head": 3} if head == HALF else {"second": 3})
    assert epochs[2].steps == 4


# The first batch finds an optimizer that is not built yet.
@pytest.mark.parametrize("batch", [0, 57])
def test_one_bad_batch_in_a_hundred(batch):
    model = model_with("float32")
    (found,) = train(model, [None], bad=[batch], batches=100)
    assert (found.steps, found.nonfinite_loss, found.began) == (1, 1, {})
    assert model.optimizer.overflow_count == 1
    # Of a linear model the biases' gradients hold nothing of its inputs.
    counts = model.optimizer.overflow_counts
    names = ("first", "second", "head")
    assert counts == {f"net/{n}/kernel": 1 for n in names} | {
        f"net/{n}/bias": 0 for n in names
    }


def test_the_monitor_says_it(caplog):
    model, monitor = model_with("float32"), mp.MixedPrecisionMonitor(verbose=1)
    train(model, [LARGE], bad=[2], callbacks=[monitor])
    (said,) = [r.getMessage() for r in caplog.records if "Epoch 1" in r.getMessage()]
    assert said.startswith(
        "Epoch 1: 4 steps overflowed this epoch; in 1 of them the loss"
    )
    assert said.endswith("nearest the loss first, in 'second' (3).")


def test_gradients_that_underflow_are_no_overflow():
    (found,) = train(model_with("float32"), [2.0**-14])
    assert found == Attribution({}, {}, 0)
    assert describe(found) == "No layer overflowed since training began."


def test_layers_of_one_name_are_told_apart():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__(name="twins")
            self.one = dense(4, "twin", 0.25)
            self.two = dense(4, "twin", 2.0**-12)
            self.loud = Loud(dtype=HALF)
            self.head = dense(2, "head", 1.0, dtype="float32")

        def call(self, x):
            return self.head(self.loud(self.two(self.one(x))))

    model = Twins()
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(0.0)), product_loss)
    model(np.ones((1, 4), "float32"))
    (found,) = train(model, [LARGE], batches=1)
    assert found.began == {"twin#2": 1}
    assert found.spread == {"twin#2": 1, "twin": 1}
    counts = model.optimizer.overflow_counts
    assert len(counts) == 6
    assert counts["twins/twin/kernel"] == counts["twins/twin/kernel#2"] == 1
    assert counts["twins/head/kernel"] == 0


class Untracked(keras.Sequential):
    """Logs something that is no loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.other = keras.metrics.Mean(name="other")

    @property
    def metrics(self):
        return [self.other]


def test_what_no_metric_tracks_is_not_known():
    found = train(model_with(train_step=Untracked), [LARGE], bad=[2])
    assert found[0].nonfinite_loss is None
    # Nothing but where gradients overflowed is left to tell by.
    assert found[0].began == {"head": 1, "second": 3}
    assert "whether the loss itself was finite is not known" in describe(found[0])


def test_several_times_add_up_and_stay_in_order():
    first = Attribution({"b": 1}, {"b": 1, "d": 2}, 0)
    later = Attribution({"a": 2, "c": 1}, {"a": 2, "c": 3, "d": 3}, None)
    total = first + later
    assert total == Attribution(
        {"b": 1, "a": 2, "c": 1}, {"b": 1, "a": 2, "c": 3, "d": 5}, 0
    )
    # From the loss back: both say that "d" is last, none where "b" is.
    assert list(total.spread) == ["b", "a", "c", "d"]
    assert list((later + first).spread) == ["a", "c", "b", "d"]


def test_in_words():
    began = {"d": 1, "c": 9, "b": 2, "a": 1}
    text = describe(Attribution(began, began, 3), "this epoch")
    assert text.startswith("16 steps overflowed this epoch; in 3 of them the loss")
    assert text.endswith("in 'd' (1), 'c' (9), 'b' (2) and 1 more.")
    assert "keep_float32=['c']" in keep_float32(Attribution(began, began, 13))
    assert "OverflowInspector" in keep_float32(Attribution(began, began, 14))
