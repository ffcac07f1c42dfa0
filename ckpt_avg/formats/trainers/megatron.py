"""Megatron-LM: iter_0000100/mp_rank_00/model_optim_rng.pt (megatron/training/checkpointing.py)."""

from ckpt_avg.formats.trainers.trainer import Folder, Layout, Trainer, WeightFiles
from ckpt_avg.text import argument, listing, quote


def _weights(folder: Folder) -> WeightFiles | None:
    ranks = folder.folders(r"mp_rank_\d+(_\d+)*")
    if not ranks:
        return None
    file = folder.path / ranks[0] / "model_optim_rng.pt"
    if len(ranks) == 1 and file.exists():
        return WeightFiles(file)
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
