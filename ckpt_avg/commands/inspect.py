"""`inspect`: what a path holds and how it would be read, even where nobody prepared it for averaging."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.checkpoint.spec import CheckpointSpec
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CkptAvgError, IncompatibleError
from ckpt_avg.formats.folder import find_weights
from ckpt_avg.formats.open import make_reading, open_checkpoint
from ckpt_avg.formats.trainers.any_script import SUFFIXES
from ckpt_avg.runs.candidates import survey
from ckpt_avg.runs.discover import discover
from ckpt_avg.runs.run_folder import Skipped, entries_of
from ckpt_avg.text import plural

_MOST = 100  # entries of an unprepared folder that are looked into


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint of a run folder, with what files beside it and copies of it record, too."""

    spec: CheckpointSpec
    record: Record


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a path holds.

    Attributes:
        path: what was looked at.
        checkpoint: the one checkpoint that it is; None for a run folder.
        listed: the checkpoints of a run folder in order.
        unreadable: name → why it cannot be read.
        skipped: what would be left out.
        seen: (name, what it seems to be) for a folder that holds no checkpoint.
        needed: what would make such a folder readable; empty otherwise.
        notes: what the user should know.
    """

    path: Path
    checkpoint: CheckpointSpec | None = None
    listed: tuple[Listed, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seen: tuple[tuple[str, str], ...] = ()
    needed: str = ""
    notes: tuple[str, ...] = ()


def inspect(
    path: str | os.PathLike[str],
    *,
    state_key: str | None = None,
    ema: bool = False,
    strip_prefix: str | None = None,
) -> Inspection:
    """Looks at a checkpoint or a run folder; reads headers only.

    Args:
        path: a checkpoint file, a checkpoint folder, a run folder, or any other folder.
        state_key, ema, strip_prefix: how to read each checkpoint, as for `open_checkpoint`.

    Returns:
        What was found. A folder without checkpoints is described, too.

    Raises:
        UsageError: there is nothing at ``path``.
        CheckpointFormatError: it is one file or one checkpoint folder that cannot be read.
    """
    path = Path(path)
    reading = make_reading(state_key, ema, strip_prefix)
    try:
        discovery = discover([path])
    except IncompatibleError as error:
        return Inspection(path, seen=_look_around(path), needed=str(error))
    if discovery.named == (path,):
        with open_checkpoint(path, state_key=state_key, ema=ema, strip_prefix=strip_prefix) as checkpoint:
            return Inspection(path, checkpoint.spec)
    with ExitStack() as stack:
        try:
            found = survey(discovery, reading, stack, copy_test="samples")
        except IncompatibleError as error:
            return Inspection(path, skipped=discovery.skipped, seen=_look_around(path), needed=str(error))
        listed = [
            Listed(candidate.checkpoint.spec, candidate.record)
            for candidate in found.candidates
            if candidate.checkpoint is not None
        ]
        unreadable = [(each.path.name, str(each.error)) for each in found.candidates if each.checkpoint is None]
        needed = "" if listed else "no checkpoint can be read, and it is said above why"
        seen = () if listed else _look_around(path)
        return Inspection(path, None, tuple(listed), tuple(unreadable), found.skipped, seen, needed, found.notes)


def _look_around(folder: Path) -> tuple[tuple[str, str], ...]:
    """Says of each entry of a folder what it seems to be."""
    if not folder.is_dir():
        return ()
    entries = entries_of(folder)
    seen = [(path.name, _look_at(path)) for path in entries[:_MOST]]
    if len(entries) > _MOST:
        seen.append(("…", f"and {len(entries) - _MOST:,} more"))
    return tuple(seen)


def _look_at(path: Path) -> str:
    try:
        if path.is_dir():
            weights = find_weights(path)
            if weights is None:
                return f"a folder with {plural(len(entries_of(path)), 'entry')}"
            return weights.problem or "a checkpoint folder" + (f" ({weights.kind})" if weights.kind else "")
        if not path.is_file():
            return "a link to nothing, a device, pipe or socket"
        if not path.name.lower().endswith(
            (*SUFFIXES, ".pkl", ".nemo", ".jit", ".onnx", ".h5", ".npz", ".tar", ".gguf")
        ):
            return f"no checkpoint by its name, {plural(path.stat().st_size, 'byte')}"
        with open_checkpoint(path) as checkpoint:
            return f"{checkpoint.spec.format} with {plural(len(checkpoint.spec.tensors), 'tensor')}"
    except (CkptAvgError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")
