"""Checkpoints that are folders: which of the files in one have the weights.

`find_weights` reads names alone, so that a run folder with hundreds of checkpoints is listed at once. A folder may have
the weights in several forms. It uses the first of this order, as transformers does: one safetensors file, safetensors
shards with an index, one torch file, torch shards with an index; then those of distributed training.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.dcp import open_dcp
from ckpt_avg.formats.dcp_safetensors import open_dcp_safetensors
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.sharded import SUFFIX, open_sharded
from ckpt_avg.formats.single_file import open_file
from ckpt_avg.formats.trainers import torch_dcp, transformers
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Folder, Stored, WeightFiles
from ckpt_avg.text import listing, quote


def find_weights(path: Path) -> WeightFiles | None:
    """Returns which files of a folder have the weights of one checkpoint; None if it is no checkpoint folder.

    Raises:
        CheckpointFormatError: the folder cannot be listed.
    """
    try:
        folder = Folder.of(path)
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be listed: {error.strerror}. Check its permissions.") from error
    marked = (each for each in TRAINERS if each.folder_files and all(map(folder.matching, each.folder_files)))
    kind = next((each.name for each in marked), None)
    for trainer in TRAINERS:
        # Each file may be sharded, with an index of the same name.
        found = [each for name in trainer.weight_files for each in (name, name + SUFFIX) if each in folder.names]
        if found:
            stored = Stored.INDEX if found[0].endswith(SUFFIX) else Stored.FILE
            stem, suffix = found[0].removesuffix(SUFFIX).rsplit(".", 1)
            further = folder.matching(rf"{stem}_\d+\.{suffix}")  # Accelerate numbers the models of one training
            own = kind if trainer.folder_files else trainer.name
            return WeightFiles(path / found[0], stored, others=(*found[1:], *further), kind=own)
    for trainer in TRAINERS:
        if weights := trainer.weights(folder):
            weights = replace(weights, kind=kind or (None if trainer.folder_files else trainer.name))
            return _inside(weights) if weights.stored is Stored.FOLDER else weights
    return None


def _inside(weights: WeightFiles) -> WeightFiles | None:
    inner = find_weights(weights.path)
    others = (*weights.others, *(inner.others if inner else ()))
    return inner and replace(inner, kind=weights.kind or inner.kind, others=others, nested=weights.nested)


def open_folder(path: Path, reading: Reading) -> Checkpoint:
    """Opens a checkpoint folder.

    Raises:
        CheckpointFormatError: it is none, cannot be opened here, or is damaged.
    """
    weights = find_weights(path)
    if weights is None:
        raise CheckpointFormatError(
            f"{path}: expected a checkpoint folder (with {', '.join(transformers.TRAINER.weight_files[:2])}, a shard "
            f"index, or {torch_dcp.METADATA}), got one with {listing(map(quote, sorted(os.listdir(path))))}. Name the "
            "checkpoint in it."
        )
    if weights.problem:
        raise CheckpointFormatError(f"{path}: {weights.problem}")
    checkpoint = _open(weights, path, reading)
    spec = checkpoint.spec
    notes = spec.notes
    if weights.others:
        used, rest = quote(weights.path.name), listing(map(quote, weights.others))
        notes = (f"the folder has several forms of weights: {used} is read, not {rest}", *notes)
    return replace(checkpoint, spec=replace(spec, path=path, kind=weights.kind or spec.kind, notes=notes))


def _open(weights: WeightFiles, folder: Path, reading: Reading) -> Checkpoint:
    if weights.stored is Stored.INDEX:
        return open_sharded(weights.path, folder, reading)
    if weights.stored is Stored.DCP:
        return open_dcp(weights.path, folder, reading)
    if weights.stored is Stored.DCP_SAFETENSORS:
        shards = Folder.of(weights.path).matching(torch_dcp.SHARD)
        return open_dcp_safetensors([weights.path / name for name in shards], folder, reading)
    return open_file(weights.path, reading)


def refuse_part(path: Path) -> None:
    """Raises CheckpointFormatError for a file that has, by its name, one rank's part of each tensor."""
    for trainer in TRAINERS:
        if problem := trainer.refuse(path):
            raise CheckpointFormatError(f"{path}: {problem}")
        for pattern in trainer.rank_files:
            if match := re.fullmatch(pattern, path.name):
                rank = match[1]
                other = path.name.replace(rank, f"{int(rank) ^ 1:0{len(rank)}}")
                if path.with_name(other).exists():
                    raise CheckpointFormatError(
                        f"{path}: the file has one rank's part of the weights ({quote(other)} is next to it). Join the "
                        "parts with the tool of the framework that trained the model, then average the results."
                    )
