"""Reads the files next to the weights in which trainers record step, epoch, metrics and rates: `Trainer.sidecar`.

A file that is not in its usual form records nothing: the weights can be averaged without it.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats import torch_zip
from ckpt_avg.formats.trainers.records import record_of
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Contents, Trainer
from ckpt_avg.limits import LIMITS


def record_beside(path: Path, epoch: int | None) -> Record:
    """Returns what files next to a checkpoint, or in its folder, record of it.

    Args:
        path: the checkpoint.
        epoch: the epoch that the checkpoint itself records.
    """
    record = Record()
    for trainer in TRAINERS:
        if trainer.sidecar and (file := trainer.sidecar.path_for(path)):
            read = trainer.sidecar.read
            record = record.or_else(read(_text_of(file), epoch) if read else _torch_record(file, trainer))
    return record


def _torch_record(path: Path, trainer: Trainer) -> Record:
    try:
        with InputFile(path) as file:
            return record_of(Contents(torch_zip.read_contents(file).objects), trainer)
    except CheckpointFormatError:
        return Record()


def _text_of(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return _text(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _text(path: Path, _modified: int, _size: int) -> str:
    """Reads a table of the whole run once for all its checkpoints, unless it changes."""
    try:
        with InputFile(path) as file:
            return file.read(0, file.size).decode("utf-8") if file.size <= LIMITS.log else ""
    except (CheckpointFormatError, UnicodeDecodeError):
        return ""
