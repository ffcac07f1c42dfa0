"""Sources → checkpoints, by names alone.

Checkpoints that were named keep their order. A run folder gives its checkpoint files and folders in natural order
(``step_9`` before ``step_10``), each stored file once, and says what it skips. `candidates` reads what they record.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.formats.trainers.any_script import SUFFIXES
from ckpt_avg.formats.trainers.file_names import is_alias
from ckpt_avg.limits import LIMITS
from ckpt_avg.runs.run_folder import ALIAS, Skipped, SourceContents, entries_of, identity_of, list_folder
from ckpt_avg.text import listing, quote

_DEEPEST = 3  # levels of folders that are searched below a run folder without checkpoints of its own

# One path, or several.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Discovery:
    """The checkpoints of all sources."""

    sources: tuple[SourceContents, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """All checkpoints in order."""
        return tuple(path for source in self.sources for path in source.paths)

    @property
    def named(self) -> tuple[Path, ...]:
        """The checkpoints that were named, not found in a run folder."""
        return tuple(path for source in self.sources if not source.is_run for path in source.paths)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What is not averaged, and why."""
        return tuple(item for source in self.sources for item in source.skipped)


def discover(sources: Sources) -> Discovery:
    """Lists the checkpoints of the sources.

    Args:
        sources: checkpoint files, checkpoint folders and run folders. A run folder without checkpoints on its first
            level is searched below.

    Raises:
        UsageError: a source does not exist, or a checkpoint is listed twice.
        IncompatibleError: a folder contains no checkpoint, or several folders with checkpoints.
    """
    originals = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    try:
        found = Discovery(tuple(map(_list_source, originals)))
        refuse_repeated((path, identity_of(path)) for path in found.paths)
    except OSError as error:  # a file disappeared, or became unreadable, after its folder was listed
        raise UsageError(f"{quote(error.filename)}: {error.strerror}. If training still runs, try again.") from error
    return found


def refuse_repeated(checkpoints: Iterable[tuple[Path, Hashable]]) -> None:
    """Raises UsageError where two paths have the same identity; an empty identity is unknown."""
    seen: dict[Hashable, Path] = {}
    for path, identity in checkpoints:
        if identity and identity in seen:
            also = f" (also as {seen[identity]})" if seen[identity] != path else ""
            raise UsageError(
                f"{path}: the same checkpoint is listed twice{also}, so it would count double. List it once."
            )
        seen[identity] = path


def _list_source(original: str | os.PathLike[str]) -> SourceContents:
    source = Path(original)
    if not os.fspath(original):
        raise UsageError("expected the path of a checkpoint file or a run folder, got an empty path.")
    try:
        exists = source.exists()
    except (OSError, ValueError) as error:  # no permission, a name too long or with NUL
        raise UsageError(
            f"{quote(source)}: cannot be accessed: {getattr(error, 'strerror', None) or error}. Check the path."
        ) from error
    if not exists:
        what = "broken symbolic link" if source.is_symlink() else "no such file or folder"
        raise UsageError(f"{source}: {what}. Check the path.")
    if not source.is_dir():
        return SourceContents((source,), False)
    found = _search(source, _DEEPEST, itertools.count())
    if found is None:
        raise IncompatibleError(_nothing(source))
    return found


def _search(folder: Path, depth: int, visits: Iterator[int]) -> SourceContents | None:
    """Returns the checkpoints of a folder, or of the only folder inside it that has some; None without any."""
    if next(visits) > LIMITS.folders:
        raise IncompatibleError(
            f"{folder}: expected checkpoints in the first {LIMITS.folders:,} folders, got none. Name the run folder."
        )
    found = list_folder(folder)
    has_only_aliases = found.is_run and all(is_alias(path.name) for path in found.paths)
    own = found if found.paths else None
    if depth == 0 or (found.paths and not has_only_aliases):
        return own
    inner = []
    skipped = {item.path for item in found.skipped}
    for path in entries_of(folder):
        if path not in skipped and not path.name.startswith(".") and path.is_dir() and not path.is_symlink():
            inside = _search(path, depth - 1, visits)
            if inside is not None:
                inner.append((path, inside))
    if len(inner) > 1:
        raise IncompatibleError(
            f"{folder}: expected the checkpoints of one run, got {len(inner)} folders with checkpoints: "
            f"{listing(quote(path.relative_to(folder)) for path, _ in inner)}. Name one of them."
        )
    if not inner:
        return own
    path, inside = inner[0]
    aliases = [Skipped(alias, f"{ALIAS}; the run is in {path.name}") for alias in found.paths]
    return replace(
        inside,
        skipped=(*found.skipped, *aliases, *inside.skipped),
        notes=inside.notes or (f"the checkpoints are in {path}",),
    )


def _nothing(folder: Path) -> str:
    """Says what a folder without checkpoints contains instead."""
    message = f"{folder}: expected checkpoint files ({', '.join(SUFFIXES)}) or checkpoint folders, got none"
    skipped = list_folder(folder).skipped
    if skipped:
        message += "; skipped: " + listing(f"{quote(item.path.name)} ({item.reason})" for item in skipped)
    inner = [path.name for path in entries_of(folder) if path.is_dir() and not path.name.startswith(".")]
    if inner:
        message += f". Its folders {listing(map(quote, inner))} have none in the first {_DEEPEST} levels"
    return f"{message}. Name a folder or files with checkpoints."
