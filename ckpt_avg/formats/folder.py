"""Checkpoints that are folders: which of the files in one hold the weights.

`form_of` looks at names alone, so that a run folder with hundreds of checkpoints is listed at once. Where a folder
holds several forms of the weights, the first of this order is taken, as transformers does: one safetensors file,
safetensors shards with an index, one torch file, torch shards with an index; then those of distributed training.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.dcp import METADATA, open_dcp
from ckpt_avg.formats.dcp_safetensors import open_dcp_safetensors
from ckpt_avg.formats.one_file import open_file
from ckpt_avg.formats.sharded import SUFFIX, open_sharded
from ckpt_avg.formats.state_dict import Reading
from ckpt_avg.formats.trainers.file_names import SUFFIXES
from ckpt_avg.text import listing, quote

# In order of preference; each may also be sharded, with an index of the same name.
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_DEEPSPEED = "mp_rank_00_model_states.pt"
_ZERO3 = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_DCP_SHARD = re.compile(r"shard-(\d{1,9})-model-(\d{1,9})-of-(\d{1,6})\.safetensors")
_LONE_SHARD = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_MEGATRON = re.compile(r"mp_rank_\d+(_\d+)*")
# Files that hold one rank's part of each tensor: Meta's tensor parallel ones, fairseq's, those of Megatron-DeepSpeed.
_RANK = re.compile(r"consolidated\.(\d\d)\.(pth|pt|safetensors)|.*-shard(\d+)\.pt|mp_rank_(\d\d)_model_states\.pt")
_FSDP = re.compile(r"pytorch_model_fsdp_\d+")

_Reader = Literal["file", "index", "DCP", "DCP safetensors", "folder", "refused", "half-written"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a folder holds its weights.

    Attributes:
        reader: what opens it; ``refused`` and ``half-written`` cannot be opened.
        target: the file or folder that holds the weights.
        kind: the trainer, where it shows.
        problem: why it cannot be opened, and the way out.
        others: names of further weights that are not taken.
    """

    reader: _Reader
    target: Path
    kind: str | None = None
    problem: str = ""
    others: tuple[str, ...] = ()

    def inside(self, folder: Path) -> bool:
        """Whether the weights lie in a folder inside ``folder``."""
        return (self.target.parent if self.reader in ("file", "index") else self.target) != folder


def form_of(folder: Path) -> Form | None:
    """Returns how a folder holds the weights of one checkpoint, or None if it is no checkpoint folder.

    Raises:
        CheckpointFormatError: the folder cannot be listed.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointFormatError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error
    kind = _kind(names)
    found = [each for name in _WEIGHTS for each in (name, name + SUFFIX) if each in names]
    if found:
        others = tuple(found[1:]) + tuple(
            sorted(name for name in names if re.fullmatch(r"(pytorch_)?model_\d+\.(safetensors|bin)", name))
        )
        return Form("index" if found[0].endswith(SUFFIX) else "file", folder / found[0], kind, others=others)
    for name in _ADAPTERS:
        if name in names:
            return Form("file", folder / name, "PEFT adapter")
    return _distributed(folder, names, kind)


def refuse_part(path: Path) -> None:
    """Raises CheckpointFormatError for a file whose name says that it holds one rank's part of each tensor."""
    if _ZERO3.fullmatch(path.name):
        raise CheckpointFormatError(f"{path}: {_zero3(path.parent)}")
    if match := _RANK.fullmatch(path.name):
        number = next(each for each in match.groups()[::-1] if each and each.isdigit())
        other = path.name.replace(number, f"{int(number) ^ 1:0{len(number)}}")
        if path.with_name(other).exists():
            raise CheckpointFormatError(
                f"{path}: expected whole weights, got the part of one of several ranks ({quote(other)} is beside it). "
                "Join the parts with the tool of the framework that trained it, then average the results."
            )


def open_folder(folder: Path, reading: Reading) -> Checkpoint:
    """Opens a checkpoint folder.

    Raises:
        CheckpointFormatError: it is none, cannot be opened here, or is damaged.
    """
    form = form_of(folder)
    if form is None:
        raise CheckpointFormatError(
            f"{folder}: expected a checkpoint folder (with {', '.join(_WEIGHTS[:2])}, an index of shards, or {METADATA}"
            f"), got one with {listing(map(quote, sorted(os.listdir(folder))))}. Name the checkpoint in it."
        )
    if form.problem:
        raise CheckpointFormatError(f"{folder}: {form.problem}")
    checkpoint = _open(form, folder, reading)
    spec = checkpoint.spec
    notes = spec.notes
    if form.others:
        notes = (f"of several forms of weights {quote(form.target.name)} is taken, not "
                 f"{listing(map(quote, form.others))}", *notes)  # fmt: skip
    return replace(checkpoint, spec=replace(spec, path=folder, kind=form.kind or spec.kind, notes=notes))


def _open(form: Form, folder: Path, reading: Reading) -> Checkpoint:
    if form.reader == "file":
        return open_file(form.target, reading)
    if form.reader == "index":
        return open_sharded(form.target, folder, reading)
    if form.reader == "DCP":
        return open_dcp(form.target, folder, reading)
    if form.reader == "DCP safetensors":
        names = sorted(name for name in os.listdir(form.target) if _DCP_SHARD.fullmatch(name))
        return open_dcp_safetensors([form.target / name for name in names], folder, reading)
    return open_folder(form.target, reading)


def _kind(names: Collection[str]) -> str | None:
    if "trainer_state.json" in names:
        return "HF Trainer"
    if any(re.fullmatch(r"random_states_\d+\.pkl", name) for name in names):
        return "Accelerate"
    if "meta.pt" in names and METADATA in names:
        return "Lightning"
    return None


def _distributed(folder: Path, names: set[str], kind: str | None) -> Form | None:
    # Beside checkpoint files it belongs to something else, unless the parts that it describes are there.
    is_dcp = any(name.endswith(".distcp") for name in names) or not any(name.endswith(SUFFIXES) for name in names)
    if METADATA in names and is_dcp:
        return Form("DCP", folder, kind)
    shards = [match for name in names if (match := _DCP_SHARD.fullmatch(name))]
    if shards:
        return _dcp_safetensors(folder, [(int(match[1]), int(match[2]), int(match[3])) for match in shards])
    if any(name.endswith(".distcp") for name in names):
        return Form(
            "half-written",
            folder,
            kind,
            f"half-written: expected {METADATA} beside the *.distcp files, which is saved last, got none. Leave it "
            "out.",
        )
    lone = sorted(name for name in names if _LONE_SHARD.fullmatch(name))
    if len(lone) == 1 and "-00001-of-00001." in lone[0]:
        return Form("file", folder / lone[0], kind)
    if lone:
        return Form(
            "half-written",
            folder / lone[0],
            kind,
            f"half-written: expected a shard index (*{SUFFIX}) beside {quote(lone[0])}, which is saved last, got none. "
            "Leave it out.",
        )
    if _DEEPSPEED in names:
        return _deepspeed(folder, names)
    if any(_ZERO3.fullmatch(name) for name in names):
        return Form("refused", folder, "DeepSpeed", _zero3(folder))
    megatron = sorted(name for name in names if _MEGATRON.fullmatch(name) and (folder / name).is_dir())
    if megatron:
        return _megatron(folder, megatron)
    return _inside(folder, names, kind)


def _inside(folder: Path, names: set[str], kind: str | None) -> Form | None:
    """Looks for the one folder inside that holds the weights, where trainers put one."""
    inner = sorted(name for name in names if _FSDP.fullmatch(name) and (folder / name).is_dir())
    if inner:
        form = form_of(folder / inner[0])
        return form and replace(form, kind=form.kind or kind, others=tuple(inner[1:]))
    latest = folder / "latest"  # DeepSpeed: names the folder of the last step
    if "latest" in names and latest.is_file():
        steps = [name for name in names if (folder / name).is_dir() and _is_deepspeed(folder / name)]
        if len(steps) == 1:
            form = form_of(folder / steps[0])
            return form and replace(form, kind=kind or form.kind)
    if kind and "pytorch_model" in names and _is_deepspeed(folder / "pytorch_model"):
        return form_of(folder / "pytorch_model")
    return None


def _is_deepspeed(folder: Path) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return _DEEPSPEED in names or any(_ZERO3.fullmatch(name) for name in names)


def _dcp_safetensors(folder: Path, shards: list[tuple[int, int, int]]) -> Form:
    for what, numbers, count in (
        ("ranks", {rank for rank, _, _ in shards}, max(rank for rank, _, _ in shards)),
        ("files", {number for _, number, _ in shards}, max(of for _, _, of in shards)),
    ):
        missing = [str(each) for each in itertools.islice(_missing(numbers, count), 20)]
        if missing:
            problem = (
                f"expected the shards of {what} 1 to {count:,}, got none of {', '.join(missing)}. Copy all of them."
            )
            return Form("refused", folder, "torch DCP", problem)
    return Form("DCP safetensors", folder, "torch DCP")


def _missing(numbers: Collection[int], count: int) -> Iterator[int]:
    """Yields what of 1 to ``count`` is not there; ``count`` comes from a name, and may be any number."""
    return (each for each in range(1, count + 1) if each not in numbers)


def _deepspeed(folder: Path, names: set[str]) -> Form:
    ranks = sorted(name for name in names if re.fullmatch(r"mp_rank_\d+_model_states\.pt", name))
    if len(ranks) > 1:
        problem = (
            f"expected the model in one file, got its parts on {len(ranks)} ranks of DeepSpeed model parallelism. "
            "Convert it with the tool of the framework that trained it (Megatron-DeepSpeed: tools/convert_checkpoint), "
            "then average the results."
        )
        return Form("refused", folder, "DeepSpeed", problem)
    if any(_ZERO3.fullmatch(name) for name in names):
        return Form("refused", folder, "DeepSpeed", _zero3(folder))
    return Form("file", folder / _DEEPSPEED, "DeepSpeed")


def _zero3(folder: Path) -> str:
    return (
        "expected whole weights, got DeepSpeed ZeRO stage 3, which cuts each across the ranks. Join them first: "
        f"python {quote(folder.parent / 'zero_to_fp32.py')[1:-1]} {quote(folder.parent)[1:-1]} OUT_FOLDER "
        f"--tag {quote(folder.name)[1:-1]}. Then average the results."
    )


def _megatron(folder: Path, ranks: list[str]) -> Form:
    inside = folder / ranks[0] / "model_optim_rng.pt"
    if len(ranks) == 1 and inside.exists():
        return Form("file", inside, "Megatron-LM")
    problem = (
        f"expected whole weights, got the parts of {len(ranks)} Megatron tensor- or pipeline-parallel ranks "
        f"({listing(map(quote, ranks))}). Convert it first: python tools/checkpoint/convert.py --model-type GPT "
        f"--load-dir {quote(folder.parent)[1:-1]} --save-dir OUT_FOLDER --target-tensor-parallel-size 1 "
        "--target-pipeline-parallel-size 1. Then average the results."
    )
    return Form("refused", folder, "Megatron-LM", problem)
