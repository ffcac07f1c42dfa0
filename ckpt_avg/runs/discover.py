"""Sources → checkpoints, by names alone.

Checkpoints that were named keep their order. A run folder gives its checkpoint files and folders in natural order
(``step_9`` before ``step_10``), each stored file once, and says what it skips. `candidates` reads what they record.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, ResourceError, UsageError
from ckpt_avg.files.missing import missing
from ckpt_avg.formats.folder import DEEPEST, file_has_weights, may_have_weights
from ckpt_avg.formats.open import open_with
from ckpt_avg.formats.reading import AllModels
from ckpt_avg.formats.trainers.file_names import is_alias
from ckpt_avg.formats.trainers.name_patterns import NO_CHECKPOINTS, SUFFIXES
from ckpt_avg.limits import LIMITS
from ckpt_avg.runs.run_folder import ALIAS, Skipped, SourceContents, entries_of, identity_of, is_overruled, list_folder
from ckpt_avg.text import argument, listing, quote

OWN_AVERAGE = "an earlier average made by ckpt-avg"
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


def discover(sources: Sources, include: Iterable[str] = ()) -> Discovery:
    """Lists the checkpoints of the sources.

    Args:
        sources: checkpoint files, checkpoint folders and run folders. A run folder without checkpoints on its first
            level is searched below.
        include: patterns of names that bring back what is skipped for its name, if they match nothing else.

    Raises:
        UsageError: a source does not exist, or a checkpoint is listed twice.
        IncompatibleError: a folder contains no checkpoint, or several folders with checkpoints.
    """
    originals = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not originals:
        raise UsageError("sources: got no path. Name checkpoint files, checkpoint folders or run folders.")
    try:
        found = Discovery(tuple(_list_source(each, include) for each in originals))
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


def _list_source(original: str | os.PathLike[str], include: Iterable[str]) -> SourceContents:
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
        what = "broken symbolic link. Check the path." if source.is_symlink() else missing(original)
        raise UsageError(f"{os.fspath(original)}: {what}")
    if not source.is_dir():
        return SourceContents((source,), False)
    found = _search(source, DEEPEST, set(), include)
    if not found:
        raise IncompatibleError(_nothing(source))
    if len(found) > 1:
        raise IncompatibleError(_several(source, found))
    return found[0]


def _search(folder: Path, depth: int, seen: set[tuple[int, int]], include: Iterable[str]) -> list[SourceContents]:
    """Returns the checkpoints of a folder, or else those of each folder inside it that has some."""
    seen.add(identity_of(folder))
    if len(seen) > LIMITS.folders:
        raise IncompatibleError(
            f"{folder}: expected checkpoints in the first {LIMITS.folders:,} folders, got none. Name the run folder."
        )
    found = list_folder(folder, include)
    has_only_aliases = found.is_run and all(is_alias(path.name) for path in found.paths)
    own = [found] if found.paths else []
    if depth == 0 or (found.paths and not has_only_aliases):
        return own
    skipped = {item.path for item in found.skipped}
    entries = [path for path in entries_of(folder) if path not in skipped and may_have_weights(path.name)]
    if any(path.name == "snapshots" for path in entries):  # of a Hugging Face cache, whose links lead to its blobs
        entries = [path for path in entries if path.name != "blobs"]
    inner: list[SourceContents] = []
    for is_link in (False, True):  # a link may lead to anything: only if there is nothing else
        for path in entries if not inner else ():
            if path.is_symlink() == is_link and path.is_dir() and identity_of(path) not in seen:
                inner += _search(path, depth - 1, seen, include)
    if len(inner) > 1:
        inner = [each for each in inner if not each.is_run or any(map(_has_weights, each.paths))] or inner
    averages = [each.folder for each in inner if not each.is_run and is_own_average(each.folder)]
    if 0 < len(averages) < len(inner):
        inner = [each for each in inner if each.folder not in averages]
    if len(inner) != 1:
        return inner or own
    where = inner[0].folder
    aliases = [Skipped(alias, f"{ALIAS}; the run is in {where.relative_to(folder).parts[0]}") for alias in found.paths]
    return [
        replace(
            inner[0],
            skipped=(*found.skipped, *aliases, *(Skipped(each, OWN_AVERAGE) for each in averages), *inner[0].skipped),
            notes=(f"the checkpoints are in {where}", *(note for note in inner[0].notes if str(where) not in note)),
        )
    ]


def _has_weights(path: Path) -> bool:
    return path.is_dir() or file_has_weights(path)


def is_own_average(folder: Path) -> bool:
    """Whether a folder is an output of this package."""
    try:
        with open_with(folder, AllModels()) as checkpoint:
            return METHOD_KEY in checkpoint.spec.metadata
    except (CheckpointFormatError, ResourceError):
        return False


def _several(folder: Path, found: Sequence[SourceContents]) -> str:
    """Says which folders have checkpoints, and how to average those of one or of all."""
    places = [each.folder.relative_to(folder) for each in found]
    patterns = Counter(re.sub(r"(^|(?<=/))\d+|\d+", _wildcard, str(place)) for place in places)
    pattern, count = patterns.most_common(1)[0]
    shown = [f"{argument(folder)}/{pattern}"] if count > 1 else [argument(folder / place) for place in places]
    runs = [place for place, each in zip(places, found, strict=True) if len(each.paths) > 1]
    one = f"To average one run, name its folder, for example {argument(folder / runs[0])}. " if runs else ""
    return (
        f"{folder}: expected the checkpoints of one run, got {len(found)} folders with checkpoints: "
        f"{listing(quote(place) for place in places)}. {one}If they are of one training, name them all: "
        f"{listing(shown, separator=' ')}"
    )


def _wildcard(number: re.Match[str]) -> str:
    return "[0-9]*" if number.group(1) is not None else "*"  # alone, * would match every file


def _nothing(folder: Path) -> str:
    """Says what a folder without checkpoints contains instead."""
    message = f"{folder}: expected checkpoint files ({', '.join(SUFFIXES)}) or checkpoint folders, got none"
    skipped = list_folder(folder).skipped
    if skipped:
        message += "; skipped: " + listing(f"{quote(item.path.name)} ({item.reason})" for item in skipped)
    if any(is_overruled(item.reason) for item in skipped):
        message += ". --include PATTERN uses what is skipped for its name"
    named = {item.path for item in skipped}
    shown = [path for path in entries_of(folder) if path not in named and not path.name.startswith(".")]
    if broken := [path.name for path in shown if not path.exists()]:
        message += f". These links lead nowhere: {listing(map(quote, broken))}"
    files = [path.name for path in shown if path.is_file()]
    if others := [name for name in files if not name.endswith(NO_CHECKPOINTS)]:
        message += f". By their first bytes, these are none: {listing(map(quote, others))}"
    if inner := [path.name for path in shown if path.is_dir()]:
        message += f". Its folders {listing(map(quote, inner))} have none in the first {DEEPEST} levels"
    return f"{message}. Name a folder or files with checkpoints."
