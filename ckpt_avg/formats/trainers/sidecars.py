"""Reads the files next to the weights in which trainers record step, epoch, metrics and rates: `Trainer.sidecars`.

A file that is not in its usual form records nothing: the weights can be averaged without it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import is_file, is_folder
from ckpt_avg.formats.trainers.records import record_of
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Contents
from ckpt_avg.limits import LIMITS


def sidecar_record(path: Path, own: Record, load: Callable[[InputFile], object]) -> Record:
    """Returns what files next to a checkpoint, or in its folder, record of it.

    Args:
        path: the checkpoint.
        own: what the checkpoint itself records.
        load: returns what a torch file contains.
    """
    record = Record()
    for trainer in TRAINERS:
        for sidecar in trainer.sidecars:
            for found in sidecar.paths_for(path):
                with contextlib.suppress(OSError, CheckpointFormatError, UnicodeDecodeError):
                    status = found.stat()
                    version = status.st_mtime_ns, status.st_size
                    if sidecar.read:
                        record = record.or_else(sidecar.read(_text(found, version), path.name, own))
                        continue
                    contents = Contents(_contents(found, version, load))
                    if sidecar.read_contents:
                        record = record.or_else(sidecar.read_contents(contents, path.name, own))
                    else:
                        record = record.or_else(record_of(contents, trainer))
    return record


def settings_of(path: Path) -> dict[str, str]:
    """Returns the settings next to a checkpoint, or in its folder, that must be equal in all: key → value as JSON."""
    found: dict[str, str] = {}
    for trainer in (each for each in TRAINERS if each.settings_file):
        in_folder = is_folder(path)
        file = path / trainer.settings_file if in_folder else path.with_name(trainer.settings_file)
        if (in_folder or path.name in trainer.weight_files) and is_file(file):
            try:
                with InputFile(file) as opened:
                    settings = json.loads(opened.read(0, min(opened.size, LIMITS.log)))
                found |= {key: json.dumps(settings[key], sort_keys=True) for key in trainer.settings if key in settings}
            except (OSError, CheckpointFormatError, ValueError, TypeError, RecursionError):
                continue
    return found


@functools.lru_cache(maxsize=4)
def _text(path: Path, _version: tuple[int, int]) -> str:
    """Reads a table of the whole run once for all its checkpoints, unless it changes."""
    with InputFile(path) as file:
        return file.read(0, file.size).decode("utf-8") if file.size <= LIMITS.log else ""


@functools.lru_cache(maxsize=1)
def _contents(path: Path, _version: tuple[int, int], load: Callable[[InputFile], object]) -> object:
    """Reads a torch file once for all checkpoints next to it, unless it changes."""
    with InputFile(path) as file:
        return load(file)
