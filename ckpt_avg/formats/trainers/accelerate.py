"""Accelerate: checkpoint_3/ with model.safetensors and random_states_0.pkl (accelerate/checkpointing.py)."""

from ckpt_avg.formats.trainers.deepspeed import is_deepspeed
from ckpt_avg.formats.trainers.trainer import Folder, Stored, Trainer, WeightFiles


def _weights(folder: Folder) -> WeightFiles | None:
    """Finds the folder of FSDP's or DeepSpeed's weights inside."""
    inner = folder.folders(r"pytorch_model_fsdp_\d+")
    inner = inner or [name for name in folder.folders("pytorch_model") if is_deepspeed(folder.path / name)]
    return WeightFiles(folder.path / inner[0], Stored.FOLDER, others=tuple(inner[1:])) if inner else None


TRAINER = Trainer(
    name="Accelerate",
    folder_files=(r"random_states_\d+\.pkl",),
    weights=_weights,
    training_state=("random_states", "sampler", "dl_state_dict", "custom_checkpoint"),
)
