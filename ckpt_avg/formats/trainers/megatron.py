"""Megatron-LM: iter_0000100/mp_rank_00/model_optim_rng.pt (megatron/training/checkpointing.py)."""

import itertools

from ckpt_avg.formats.trainers.trainer import Folder, Layout, Trainer, WeightFiles
from ckpt_avg.text import argument, listing, quote

_MOST = 100  # entries of a folder that are looked into


def _weights(folder: Folder) -> WeightFiles | None:
    if any((folder.path / name / ".zarray").exists() for name in itertools.islice(folder.names, _MOST)):
        problem = (
            "a checkpoint of Megatron in the zarr format, which cannot be read. Load and save it again with "
            "--dist-ckpt-format torch_dist, then average the results."
        )
        return WeightFiles(folder.path, problem=problem)
    ranks = folder.folders(r"[mtpe]p_rank_\d+(_([tpec]p_rank_)?\d+)*")
    if not ranks:
        return None
    if len(ranks) == 1:
        file = folder.path / ranks[0] / "model_optim_rng.pt"
        return WeightFiles(file) if file.exists() else None
    problem = (
        f"the model is split among {len(ranks)} Megatron tensor- or pipeline-parallel ranks "
        f"({listing(map(quote, ranks))}). Convert it first: python tools/checkpoint/convert.py --model-type GPT "
        f"--load-dir {argument(folder.path.parent)} --save-dir OUT_FOLDER --target-tensor-parallel-size 1 "
        "--target-pipeline-parallel-size 1. Then average the results."
    )
    return WeightFiles(folder.path, problem=problem)


TRAINER = Trainer(
    name="Megatron-LM",
    layouts=(Layout(("model", "iteration", "checkpoint_version"), raw="model"),),
    step=("iteration",),
    optimizer=("optimizer.optimizer",),
    weights=_weights,
    training_state=("distrib_optim",),
)
