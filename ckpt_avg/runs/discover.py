"""Sources → checkpoints, by names alone.

A checkpoint named by hand stays where it was named. A run folder gives its checkpoint files and checkpoint folders in
natural order (``step_9`` before ``step_10``), each stored file once; what was left out is kept with its reason. What
the checkpoints themselves tell is looked at later (`survey`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.formats.trainers.file_names import SUFFIXES, is_alias
from ckpt_avg.limits import LIMITS
from ckpt_avg.runs.run_folder import Skipped, entries_of, identity_of, list_folder
from ckpt_avg.text import listing, quote

_DEEPEST = 3  # folders inside a run folder that are searched where it holds no checkpoint itself

# One path, or several.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Group:
    """What one source gave.

    Attributes:
        paths: checkpoints in order.
        is_run: whether they were found in a run folder, rather than named by hand.
    """

    paths: tuple[Path, ...]
    is_run: bool


@dataclass(frozen=True, slots=True)
class Discovery:
    """The checkpoints of each source, what was left out, and what the user should know."""

    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All checkpoints in order."""
        return tuple(path for group in self.groups for path in group.paths)


def discover(sources: Sources) -> Discovery:
    """Lists the checkpoints of the sources.

    Args:
        sources: checkpoint files and checkpoint folders, kept in the order given, and run folders, listed in natural
            order. A run folder is searched below its first level only where that holds no checkpoint.

    Raises:
        UsageError: a source does not exist, or a checkpoint is named twice by hand.
        IncompatibleError: a folder holds no checkpoint, or several folders with checkpoints.
    """
    try:
        return _discover(sources)
    except OSError as error:  # a file went, or may not be looked at, after its folder was listed
        raise UsageError(f"{quote(error.filename)}: {error.strerror}. If the run goes on, try again.") from error


def _discover(sources: Sources) -> Discovery:
    groups: list[Group] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    for original in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
        source = _existing(original)
        if source.is_dir():
            listed = _search(source, _DEEPEST, itertools.count())
            if listed is None:
                raise IncompatibleError(_nothing(source))
            groups += listed.groups
            skipped += listed.skipped
            notes += listed.notes
        else:
            groups.append(Group((source,), False))
    seen: dict[tuple[int, int], Path] = {}
    for path in (path for group in groups for path in group.paths):
        identity = identity_of(path)
        if identity in seen:
            raise UsageError(
                f"{path}: the same checkpoint is named twice (also as {seen[identity]}), so it would count double. "
                "Name it once."
            )
        seen[identity] = path
    return Discovery(tuple(groups), tuple(skipped), tuple(notes))


def _existing(original: str | os.PathLike[str]) -> Path:
    source = Path(original)
    if not os.fspath(original):
        raise UsageError("expected the path of a checkpoint file or a run folder, got an empty one. Check the command.")
    try:
        exists = source.exists()
    except (OSError, ValueError) as error:  # no permission, a name too long or with NUL
        raise UsageError(
            f"{quote(source)}: cannot be looked at: {getattr(error, 'strerror', None) or error}. Check the path."
        ) from error
    if not exists:
        hint = "It is a symbolic link to nothing." if source.is_symlink() else "Check the path."
        raise UsageError(f"{source}: expected a checkpoint file or a run folder, got nothing there. {hint}")
    return source


def _search(folder: Path, depth: int, visits: Iterator[int]) -> Discovery | None:
    """Returns the checkpoints of a folder, or of the one folder inside it that holds some; None without any."""
    if next(visits) > LIMITS.folders:
        raise IncompatibleError(
            f"{folder}: expected checkpoints in the first {LIMITS.folders:,} folders, got none. Name the run folder."
        )
    found = list_folder(folder)
    only_aliases = found.is_run and all(is_alias(path.name) for path in found.paths)
    if found.paths and not only_aliases:
        return Discovery((Group(found.paths, found.is_run),), found.skipped)
    own = Discovery((Group(found.paths, True),), found.skipped) if found.paths else None
    if depth == 0:
        return own
    inner = []
    left_out = {item.path for item in found.skipped}
    for path in entries_of(folder):
        if path not in left_out and not path.name.startswith(".") and path.is_dir() and not path.is_symlink():
            inside = _search(path, depth - 1, visits)
            if inside is not None:
                inner.append((path, inside))
    if len(inner) > 1:
        raise IncompatibleError(
            f"{folder}: expected the checkpoints of one run, got {len(inner)} folders that hold some: "
            f"{listing(quote(path.relative_to(folder)) for path, _ in inner)}. Name one of them."
        )
    if not inner:
        return own
    path, inside = inner[0]
    aliases = [
        Skipped(alias, f"last, best or the like by its name, beside the run in {path.name}") for alias in found.paths
    ]
    return Discovery(
        inside.groups, (*found.skipped, *aliases, *inside.skipped), inside.notes or (f"the checkpoints are in {path}",)
    )


def _nothing(folder: Path) -> str:
    """Says what a folder without checkpoints holds instead."""
    message = f"{folder}: expected checkpoint files ({', '.join(SUFFIXES)}) or checkpoint folders, got none"
    skipped = list_folder(folder).skipped
    if skipped:
        message += ": " + listing((f"{quote(item.path.name)} is {item.reason}" for item in skipped), separator="; ")
    inner = [path.name for path in entries_of(folder) if path.is_dir() and not path.name.startswith(".")]
    if inner:
        message += f". It holds the folders {listing(map(quote, inner))}, with none in the first {_DEEPEST} levels"
    return f"{message}. Name a folder or files that hold some."
