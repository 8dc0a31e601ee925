"""What several processes need once: a backup that the chief writes and all read."""

import tempfile

import keras


class ChiefBackup(keras.callbacks.BackupAndRestore):
    """`BackupAndRestore` for several processes: all read what the chief wrote.

    All write, because reading a variable may take all processes; the others write to
    a folder that nobody reads. Were each to read its own, one that died between two
    writes would come back an epoch behind the rest, which would wait for it for ever.

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
            scratch = keras.callbacks.BackupAndRestore(tempfile.mkdtemp())
            self.backup_dir = scratch.backup_dir
            self._weights_path = scratch._weights_path
            self._prev_weights_path = scratch._prev_weights_path
            self._training_metadata_path = scratch._training_metadata_path
            self._prev_training_metadata_path = scratch._prev_training_metadata_path
