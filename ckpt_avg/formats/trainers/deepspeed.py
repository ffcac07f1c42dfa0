"""DeepSpeed: global_step100/mp_rank_00_model_states.pt (deepspeed/runtime/engine.py)."""

import re
from pathlib import Path

from ckpt_avg.formats.trainers.trainer import Folder, Layout, Stored, Trainer, WeightFiles
from ckpt_avg.text import argument

_WEIGHTS = "mp_rank_00_model_states.pt"
_ZERO3 = r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"
# Files with a part of the model next to those of the ranks, and what to do.
_PARTS = {
    r"layer_\d+-model_\d+-model_states\.pt": "DeepSpeed's pipeline parallelism stores each layer in a file of its own "
    "(layer_*-model_*-model_states.pt). Convert the checkpoint first with the tool of the framework that trained it "
    "(GPT-NeoX: tools/ckpts/convert_neox_to_hf.py), then average the results.",
    r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt": "DeepSpeed stores each expert of a mixture in a file of "
    "its own (layer_*_expert_*_model_states.pt). Gather the model with the tool of the framework that trained it, then "
    "average the results.",
}


def _refuse(file: Path) -> str:
    for pattern, problem in _PARTS.items():
        is_next_to_one = file.name == _WEIGHTS and Folder.of(file.parent).matching(pattern)
        if is_next_to_one or re.fullmatch(pattern, file.name):
            return problem
    return _zero3(file.parent) if re.fullmatch(_ZERO3, file.name) else ""


def _zero3(folder: Path) -> str:
    return (
        "DeepSpeed ZeRO stage 3 splits each weight among the ranks. Convert the checkpoint first: "
        f"python {argument(folder.parent / 'zero_to_fp32.py')} {argument(folder.parent)} OUT_FOLDER "
        f"--tag {argument(folder.name)}. Then average the results."
    )


def _weights(folder: Folder) -> WeightFiles | None:
    for pattern, problem in _PARTS.items():
        if folder.matching(pattern):
            return WeightFiles(folder.path, problem=problem, nested=True)
    ranks = folder.matching(r"mp_rank_\d+_model_states\.pt")
    if _WEIGHTS in ranks and len(ranks) > 1:
        problem = (
            f"the model is split among {len(ranks)} ranks of DeepSpeed model parallelism. Convert it with the tool of "
            "the framework that trained it (Megatron-DeepSpeed: tools/convert_checkpoint), then average the results."
        )
        return WeightFiles(folder.path, problem=problem, nested=True)
    if folder.matching(_ZERO3):
        return WeightFiles(folder.path, problem=_zero3(folder.path), nested=True)
    if _WEIGHTS in ranks:
        return WeightFiles(folder.path / _WEIGHTS, nested=True)
    return _last_step(folder)


def _last_step(folder: Folder) -> WeightFiles | None:
    """Finds the one folder of a step, next to the file `latest` that names it."""
    if "latest" not in folder.names or not (folder.path / "latest").is_file():
        return None
    steps = [name for name in folder.folders(".*") if is_deepspeed(folder.path / name)]
    return WeightFiles(folder.path / steps[0], Stored.FOLDER, nested=True) if len(steps) == 1 else None


def is_deepspeed(path: Path) -> bool:
    """Whether a folder has the weights of one step."""
    try:
        folder = Folder.of(path)
    except OSError:
        return False
    return _WEIGHTS in folder.names or any(map(folder.matching, (_ZERO3, *_PARTS)))


TRAINER = Trainer(
    name="DeepSpeed",
    layouts=(Layout(("module", "ds_version"), raw="module"),),
    step=("global_steps",),
    optimizer=("optimizer",),
    weights=_weights,
    training_state=(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states",),
    refuse=_refuse,
    note="these weights have the dtype of the training; the float32 masters are in the optimizer's files "
    "(zero_to_fp32.py in the run's folder rebuilds them)",
)
