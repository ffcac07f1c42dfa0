"""sentence-transformers: modules.json, and parts of the model in folders, such as 1_Pooling/ and 2_Dense/."""

from ckpt_avg.formats.trainers.trainer import Folder, Stored, Trainer, WeightFiles

_MODULES = "modules.json"


def _weights(folder: Folder) -> WeightFiles | None:
    """Finds the first part, 0_Transformer, where older versions have the weights of the transformer."""
    parts = folder.folders(r"0_\w+") if _MODULES in folder.names else []
    return WeightFiles(folder.path / parts[0], Stored.FOLDER) if parts else None


TRAINER = Trainer(
    name="sentence-transformers", folder_files=(r"modules\.json",), models_file=_MODULES, weights=_weights
)
