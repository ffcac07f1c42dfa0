"""Opens a checkpoint of any format: a file, a shard index or a folder.

Each reader turns one format's header into a table of `TensorSpec`, and `InputFile` serves the bytes for all of them.
The format of a file is decided by its first bytes, that of a folder by the names in it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, UsageError, fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import is_folder
from ckpt_avg.formats import torch_legacy, torch_zip
from ckpt_avg.formats.folder import open_folder, refuse_part
from ckpt_avg.formats.models import models_of, open_models
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.sharded import is_index, open_sharded
from ckpt_avg.formats.single_file import open_file
from ckpt_avg.formats.trainers.file_names import record_from_name, trainer_from_name
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.sidecars import settings_of, sidecar_record
from ckpt_avg.text import ends, quote, type_of
from ckpt_avg.wording import setting, worded_all

__all__ = ["Checkpoint", "Reading", "open_checkpoint", "open_with", "refuse_missing_prefix"]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    state_key: str | None = None,
    ema: bool = False,
    strip_prefix: str | None = None,
) -> Checkpoint:
    """Opens one checkpoint and reads its header. No tensor is read and no code in it runs.

    Args:
        path: a file (safetensors, or written by ``torch.save``), whatever its suffix; a shard index
            (``….index.json``); or a checkpoint folder of transformers, accelerate, Lightning, DeepSpeed or
            ``torch.distributed.checkpoint``.
        state_key: the dotted key of the state dict in a torch file, for example ``model.encoder``. By default the keys
            that trainers use are tried.
        ema: use the EMA weights that some trainers save next to the raw ones.
        strip_prefix: strip this prefix, for example ``model.``, from the names that have it. Wrappers' prefixes
            (``module.``, ``_orig_mod.`` and the like) are stripped too if all names have them. An empty string keeps
            every name.

    Raises:
        CheckpointFormatError: it is corrupt, unsafe, of an unknown kind, or contains several state dicts.
        ResourceError: too many files are open.
        UsageError: ``ema`` and ``state_key`` are both given, or an argument has another type.

    Example:
        >>> with open_checkpoint("fixtures/mnist_cnn/epoch_20.pt") as checkpoint:
        ...     print(checkpoint.spec.format, checkpoint.spec.state_key, checkpoint.spec.record.epoch)
        torch zip model 20
    """
    reading = Reading(state_key=state_key, ema=ema, strip_prefix=strip_prefix)
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"path: got {type_of(path)}. Give a text or a path.")
    checkpoint = open_with(Path(path), reading)
    try:
        refuse_missing_prefix([checkpoint.spec], reading)
    except CheckpointFormatError:
        checkpoint.close()
        raise
    return checkpoint


def open_with(path: Path, reading: Reading) -> Checkpoint:
    """Opens a checkpoint as `open_checkpoint` does, but accepts one whose names all lack the prefix to strip."""
    if is_folder(path):
        models = models_of(path) if reading.models else {}
        checkpoint = open_models(path, models, reading) if models else open_folder(path, reading)
    elif is_index(path):
        checkpoint = open_sharded(path, path, reading)
    else:
        refuse_part(path)
        checkpoint = open_file(path, reading)
    spec = checkpoint.spec
    by_name = record_from_name(path.name)
    if checkpoint.files and path in checkpoint.files[0].path.parents:  # a name may have a slash: epoch=1-val/loss=0.5
        inner = checkpoint.files[0].path.relative_to(path.parent)
        by_name = by_name.or_else(record_from_name(str(inner), bare_number=False))
    recorded = functools.reduce(Record.or_else, (each.record_metadata(spec.metadata) for each in TRAINERS), spec.record)
    record = recorded.or_else(sidecar_record(path, spec.record.or_else(by_name), _contents))
    if by_name.is_lone_number and record.epoch is not None:
        by_name = replace(by_name, step=None)
    record = record.or_else(by_name)
    named = trainer_from_name(path) if spec.kind is None and spec.state_key is None else None
    kind = named.name if named else spec.kind
    settings, notes = settings_of(path), worded_all(spec.notes)
    return replace(checkpoint, spec=replace(spec, record=record, kind=kind, settings=settings, notes=notes))


def _contents(file: InputFile) -> object:
    reader = torch_legacy if torch_legacy.matches(file.read(0, min(file.size, 512))) else torch_zip
    return reader.read_contents(file).objects


def refuse_missing_prefix(specs: Sequence[CheckpointSpec], reading: Reading) -> None:
    """Raises CheckpointFormatError if no name of any checkpoint has the prefix to strip."""
    if specs and all(spec.lacks_prefix for spec in specs):
        got = ends(list(map(quote, specs[0].tensors)))
        given = setting("--strip-prefix", reading.strip_prefix or "")
        problem = f"{given}: expected names that begin with it, got {got}"
        fail(specs[0].path, problem, "Change it or omit it")
