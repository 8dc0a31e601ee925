"""The hook of `launch`: one callback more, and Keras as it was afterwards."""

import keras
import pytest
from support import data
from support import half_classifier

import keras_mixprec as mp
from keras_mixprec import fit_hook


@pytest.fixture
def removed():
    before = keras.Model.fit
    yield before
    fit_hook.remove()
    assert keras.Model.fit is before


class Spy(keras.callbacks.Callback):
    """Counts the monitors that stand beside it."""

    def on_train_begin(self, logs=None):
        import sys

        frame = sys._getframe()
        while not isinstance(
            owner := frame.f_locals.get("self"), keras.callbacks.CallbackList
        ):
            frame = frame.f_back
        self.monitors = [
            c for c in owner.callbacks if isinstance(c, mp.MixedPrecisionMonitor)
        ]


def test_adds_a_monitor_where_there_is_none(removed):
    fit_hook.install()
    model, spy, mine = half_classifier(), Spy(), mp.MixedPrecisionMonitor()
    history = model.fit(*data(), verbose=0, callbacks=spy)
    assert "loss_scale" in history.history
    assert len(spy.monitors) == 1
    model.fit(*data(), verbose=0, callbacks=[spy, mine])
    assert spy.monitors == [mine]
    model.fit(*data(), verbose=0)


def test_a_callback_list_gets_one_too(removed):
    fit_hook.install()
    model, spy = half_classifier(), Spy()
    listed = keras.callbacks.CallbackList([spy], add_history=True, model=model)
    for _ in range(2):
        model.fit(*data(), verbose=0, callbacks=listed)
        assert len(spy.monitors) == 1


def test_tells_what_the_last_epoch_logged(removed):
    told = []
    fit_hook.install(monitor=False, on_end=told.append)
    history = half_classifier().fit(*data(), verbose=0, epochs=2)
    (summary,) = told
    assert summary["epochs"] == 2
    assert summary["logs"] == {k: v[-1] for k, v in history.history.items()}
    assert "loss_scale" not in summary["logs"]


def test_the_last_install_counts_and_remove_removes(removed):
    told = []
    fit_hook.install(on_end=told.append)
    fit_hook.install(monitor=False)
    history = half_classifier().fit(*data(), verbose=0)
    assert told == []
    assert "loss_scale" not in history.history
    fit_hook.remove()
    assert keras.Model.fit is removed
