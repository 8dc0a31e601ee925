"""What several processes need once: a backup that the chief writes and all read."""

import json
import os
import pathlib
import tempfile

import keras


class ChiefBackup(keras.callbacks.BackupAndRestore):
    """`BackupAndRestore` for several processes: all read what the chief wrote.

    All write, because reading a variable may take all processes; the others write to
    a folder that nobody reads. Were each to read its own, one that died between two
    writes would come back an epoch behind the rest, which would wait for it for ever.

    An engine ends a process at any moment once another has died, also while it writes.
    Keras writes the weights and then, elsewhere, which epoch they are of; in between
    they do not fit. Here new weights count from the moment in which the file that names
    them and their epoch is put in the place of the old one.

    Args:
        folder: String, one that all processes see.
        is_chief: Bool, whether this process writes there.
    """

    def __init__(self, folder: str, is_chief: bool):
        super().__init__(folder)
        self.is_chief = is_chief

    def on_train_begin(self, logs=None):
        """Read the chief's backup, if there is one."""
        super().on_train_begin(logs)
        if not self.is_chief:
            self.backup_dir = tempfile.mkdtemp()

    def _load_model(self):
        metadata = pathlib.Path(self._training_metadata_path)
        if metadata.exists():
            weights = json.loads(metadata.read_text())["weights"]
            self._weights_path = str(metadata.parent / weights)
        super()._load_model()

    def _save_model(self):
        folder = pathlib.Path(self.backup_dir)
        folder.mkdir(parents=True, exist_ok=True)
        epoch, batch = self._current_epoch, self._last_batch_seen
        weights = folder / f"{epoch}-{batch}.weights.h5"
        self.model.save_weights(weights, overwrite=True)
        written = folder / "training_metadata.json.new"
        fields = {"epoch": epoch, "batch": batch, "weights": weights.name}
        written.write_text(json.dumps(fields))
        os.replace(written, folder / "training_metadata.json")
        for other in folder.glob("*.weights.h5"):
            if other != weights:
                other.unlink()
