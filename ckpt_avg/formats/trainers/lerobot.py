"""LeRobot: checkpoints/010000/pretrained_model/ and training_state/ (lerobot/utils/train_utils.py)."""

from ckpt_avg.formats.trainers.trainer import Folder, Stored, Trainer, WeightFiles

_MODEL = "pretrained_model"


def _weights(folder: Folder) -> WeightFiles | None:
    is_checkpoint = {_MODEL, "training_state"} <= folder.names
    return WeightFiles(folder.path / _MODEL, Stored.FOLDER) if is_checkpoint else None


TRAINER = Trainer(name="LeRobot", weights=_weights)
