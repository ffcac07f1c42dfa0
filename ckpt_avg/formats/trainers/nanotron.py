"""nanotron: 1000/model/, with a file for each tensor and rank, and checkpoint_metadata.json (nanotron/serialize)."""

from ckpt_avg.formats.trainers.trainer import Folder, Trainer, WeightFiles


def _weights(folder: Folder) -> WeightFiles | None:
    if not {"checkpoint_metadata.json", "model"} <= folder.names:
        return None
    problem = (
        "nanotron stores each tensor in a file of its own. Convert the checkpoint first (nanotron: "
        "examples/llama/convert_nanotron_to_hf.py), then average the results."
    )
    return WeightFiles(folder.path, problem=problem)


TRAINER = Trainer(name="nanotron", weights=_weights)
