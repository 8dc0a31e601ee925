"""The backup of several processes: whole, whenever its writer is ended."""

import contextlib
import os

import keras
import pytest
from support import data
from support import half_classifier


@pytest.fixture
def backup(monkeypatch):
    """The callback's class, of the examples."""
    examples = os.path.join(os.path.dirname(__file__), os.pardir, "examples")
    monkeypatch.syspath_prepend(examples)
    from chief import ChiefBackup

    return ChiefBackup


class Epochs(keras.callbacks.Callback):
    """Notes which epochs run, and may end the process in one of them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append((epoch, int(self.model.optimizer.iterations)))


def train(backup, folder, epochs, is_chief=True):
    x, y = data(16)
    model, seen = half_classifier("adam"), Epochs()
    callbacks = [backup(str(folder), is_chief), seen]
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(x, y, 8, epochs=epochs, verbose=0, callbacks=callbacks)
    return seen.seen


@pytest.mark.parametrize("ended_in", ["save_weights", "replace"])
def test_weights_and_epoch_fit_wherever_the_writer_is_ended(
    backup, tmp_path, monkeypatch, ended_in
):
    owner = os if ended_in == "replace" else keras.Model
    original, calls = getattr(owner, ended_in), []

    def end_the_third_time(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, ended_in, end_the_third_time)
        assert train(backup, tmp_path / "b", 9) == [(0, 0), (1, 2), (2, 4)]
    # The third epoch is trained again, from the weights of the second.
    assert train(backup, tmp_path / "b", 4) == [(2, 4), (3, 6)]
    assert not (tmp_path / "b").exists()


def test_others_read_what_the_chief_wrote_and_write_elsewhere(
    backup, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(backup, "on_train_end", lambda self, logs=None: None)
        train(backup, tmp_path / "b", 2)
    written = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert len(written) == 2
    assert train(backup, tmp_path / "b", 3, is_chief=False) == [(2, 4)]
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == written
