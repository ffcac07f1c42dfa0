"""Sources → checkpoint files, in order.

A file named by hand stays where it was named. A run folder gives its checkpoint files in natural order
(``step_9`` before ``step_10``), each stored file once; what was left out is kept with its reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, UsageError
from ckpt_avg.mapped import MappedFile
from ckpt_avg.messages import listing, quote
from ckpt_avg.readers import open_checkpoint, safetensors
from ckpt_avg.spec import METHOD_KEY

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
_BESIDE_THE_WEIGHTS = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|training_args|scaler|sampler)[\d_]*\.", re.I
)


# One path, or several.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file of a run folder that is not averaged, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """The checkpoints in order, and what was left out."""

    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...]


def discover(sources: Sources) -> Discovery:
    """Lists the checkpoint files of the sources.

    Args:
        sources: checkpoint files, kept in the order given, and run folders, listed in natural order. A folder
            is not searched below its first level.

    Raises:
        UsageError: a source does not exist, or a checkpoint is named twice by hand.
        IncompatibleError: a folder holds no checkpoint file.
    """
    paths: list[Path] = []
    skipped: list[Skipped] = []
    seen: dict[tuple[int, int], Path] = {}
    for original in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
        source = Path(original)
        if not os.fspath(original):
            raise UsageError(
                "expected the path of a checkpoint file or a run folder, got an empty one. Check the command."
            )
        try:
            exists = source.exists()
        except (OSError, ValueError) as error:  # no permission, a name too long or with NUL
            raise UsageError(f"{quote(source)}: cannot be looked at: {error}. Check the path.") from error
        if not exists:
            hint = "It is a symbolic link to nothing." if source.is_symlink() else "Check the path."
            raise UsageError(f"{source}: expected a checkpoint file or a run folder, got nothing there. {hint}")
        if source.is_dir():
            listed = _list_folder(source)
            paths += listed.paths
            skipped += listed.skipped
        else:
            paths.append(source)
    for path in paths:
        identity = _identity(path)
        if identity in seen:
            raise UsageError(
                f"{path}: the same checkpoint is named twice (also as {seen[identity]}), so it would count double. "
                "Name it once."
            )
        seen[identity] = path
    return Discovery(tuple(paths), tuple(skipped))


def natural_key(name: str) -> tuple[tuple[object, ...], str]:
    """Returns a sort key that compares runs of digits as numbers.

    Example:
        >>> sorted(["step_10.pt", "step_9.pt"], key=natural_key)
        ['step_9.pt', 'step_10.pt']
    """
    parts = re.split(r"(\d+)", name)
    # The name itself decides between step_1 and step_01, which are equal as numbers.
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def _list_folder(folder: Path) -> Discovery:
    try:
        entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error
    kept: list[Path] = []
    skipped: list[Skipped] = []
    for path in entries:
        if path.name.lower().endswith(SUFFIXES) and not path.is_dir():
            reason = _reason_to_skip(path)
            if reason is None:
                kept.append(path)
            else:
                skipped.append(Skipped(path, reason))
        elif path.name.endswith((".tmp", ".part", ".incomplete")):
            skipped.append(Skipped(path, "half-written, by its name"))
    kept, repeated = _once(kept)
    if not kept:
        raise IncompatibleError(_nothing(folder, entries, skipped))
    return Discovery(tuple(kept), (*skipped, *repeated))


def _reason_to_skip(path: Path) -> str | None:
    if not path.exists():
        return "a symbolic link to nothing"
    if _BESIDE_THE_WEIGHTS.match(path.name):
        return "training state beside the weights, by its name"
    if path.name.startswith("."):
        return "hidden, by its name"
    if _is_an_average(path):
        return "an earlier average made by ckpt-avg"
    return None


def _is_an_average(path: Path) -> bool:
    try:
        with MappedFile(path) as file:
            if not safetensors.looks_like(file.read(0, min(file.size, 9))):
                return False
        with open_checkpoint(path) as checkpoint:
            return METHOD_KEY in checkpoint.spec.metadata
    except CheckpointFormatError:
        return False  # kept here, so that it is reported when it is selected and opened


def _once(paths: Sequence[Path]) -> tuple[list[Path], list[Skipped]]:
    """Keeps one path for each stored file: a real file before a symbolic link, then the first in order."""
    chosen: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), natural_key(path.name))):
        chosen.setdefault(_identity(path), path)
    kept = [path for path in paths if chosen[_identity(path)] == path]
    repeated = [
        Skipped(path, f"the same file as {chosen[_identity(path)].name}")
        for path in paths
        if chosen[_identity(path)] != path
    ]
    return kept, repeated


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _nothing(folder: Path, entries: Sequence[Path], skipped: Sequence[Skipped]) -> str:
    message = f"{folder}: expected checkpoint files ({', '.join(SUFFIXES)}), got none"
    if skipped:
        message += ": " + listing((f"{quote(item.path.name)} is {item.reason}" for item in skipped), separator="; ")
    inner = [path.name for path in entries if path.is_dir() and not path.name.startswith(".")]
    if inner:
        return (
            f"{message}. It holds the folders {listing(map(quote, inner))}: name the files in them, in order, for "
            f"example {folder}/*/model.safetensors."
        )
    return f"{message}. Name a folder or files that hold some."
