"""One folder → the checkpoints on its first level, by names and first bytes, and why the other entries are skipped.

docs/which-files.md has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_avg.checkpoint.spec import name_of
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, UsageError
from ckpt_avg.formats.folder import checkpoint_files, find_weights, has_weights_inside, may_have_weights
from ckpt_avg.formats.sharded import SUFFIX, shards_of
from ckpt_avg.formats.trainers import accelerate
from ckpt_avg.formats.trainers.file_names import (
    EARLIER_AVERAGE,
    TRAINING_STATE,
    ends_in_a_number,
    is_alias,
    is_pretrained,
    is_training_state_folder,
    names_a_moment,
    reason_to_skip,
    record_from_name,
    stem,
)
from ckpt_avg.formats.trainers.name_patterns import UNFINISHED, UNFINISHED_FOLDERS, other_format
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import INCOMPLETE, Folder, WeightFiles
from ckpt_avg.results import Result
from ckpt_avg.text import escaped

PRETRAINED = "pretrained weights, by its name"
ALIAS = "an alias such as last or best, by its name"
_MARKER = "-unfinished"  # of a file next to a folder, until that is complete (NeMo)


@dataclass(frozen=True, slots=True, repr=False)
class Skipped(Result):
    """A file or folder of a run folder that is not averaged, and why."""

    path: Path
    reason: str

    def _title(self) -> str:
        return f"{escaped(self.path.name)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class SourceContents:
    """The checkpoints of one source.

    Attributes:
        paths: in natural order; the source itself if it is a checkpoint.
        is_run: whether it is a run folder, not a checkpoint that was named.
        skipped: what is not averaged, and why.
        notes: what the user should know.
    """

    paths: tuple[Path, ...]
    is_run: bool
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The run folder, or the checkpoint that was named."""
        return self.paths[0].parent if self.is_run else self.paths[0]


def list_folder(folder: Path, include: Iterable[str] = ()) -> SourceContents:
    """Lists the first level of a folder.

    A file that was skipped for its name is brought back by a pattern in ``include`` that matches no other checkpoint.

    Raises:
        UsageError: it cannot be listed.
    """
    try:
        own = find_weights(folder)
    except CheckpointFormatError as error:
        raise UsageError(str(error)) from error
    if own is not None and (own.models or (own.is_inside(folder) and not own.problem)) and not _is_run(folder):
        return SourceContents((folder,), False)  # its weights are in folders inside, which are no run
    files, folders, models, skipped = _sort_entries(folder)
    if own is not None:
        used = {own.path.name, *own.others}
        more = re.compile(rf"{re.escape(stem(own.path.name))}_\d+")  # the other models of one checkpoint
        is_one = own.kind == accelerate.TRAINER.name or names_a_moment(name_of(folder))
        files = [
            path
            for path in files
            if path.name not in used and not _is_shard(path) and not (is_one and more.fullmatch(stem(path.name)))
        ]
        # Only checkpoints with numbers next to them show that the folder's own weights are those of a run.
        if not folders and all(record_from_name(path.name) == Record() for path in files):
            return SourceContents((folder,), False)
        skipped.append(Skipped(own.path, own.problem or "the run's own weights, next to its checkpoints"))
    incomplete = _without_last_file(folders)
    skipped += incomplete
    unfinished = {item.path for item in incomplete}
    kept, repeated = _once([*(path for path in folders if path not in unfinished), *files])
    skipped += repeated
    named = [path for path in kept if not is_alias(path.name)]
    trained = [path for path in named if not is_pretrained(path.name)]
    if trained:
        skipped += [Skipped(path, PRETRAINED) for path in named if path not in trained]
        named = trained
    averages = [item.path for item in skipped if item.reason == EARLIER_AVERAGE]
    series = [path for path in averages if record_from_name(path.name, bare_number=False) != Record()]
    notes: tuple[str, ...] = ()
    if not named and len(series) > 1:  # names of averages, which tell epochs, and nothing else
        named, skipped = series, [item for item in skipped if item.path not in series]
        notes = (f"{folder}: by their names these are averages; nothing else is there",)
    if named or averages:  # an alias alone is not the run
        skipped += [Skipped(path, ALIAS) for path in kept if is_alias(path.name)]
        kept = named
    if named:
        known = {identity_of(path): path.name for path in kept}
        for path in models:
            same = known.get(identity_of(path))
            other = ALIAS if is_alias(path.name) else "another model or run"
            skipped.append(Skipped(path, f"the same file as {same}" if same else other))
    patterns = [each for each in include if not any(fnmatchcase(path.name, each) for path in kept)]
    back = [
        each for each in skipped if is_overruled(each.reason) and any(fnmatchcase(each.path.name, p) for p in patterns)
    ]
    kept = sorted((*kept, *(item.path for item in back)), key=in_order)
    return SourceContents(tuple(kept), True, tuple(item for item in skipped if item not in back), notes)


def is_overruled(reason: str) -> bool:
    """Whether --include overrules the reason to skip a file: its name, unless that says that it has no weights."""
    return reason.endswith("by its name") and reason not in (INCOMPLETE, TRAINING_STATE)


def natural_key(name: str) -> tuple[tuple[object, ...], str]:
    """Returns a sort key that compares runs of digits as numbers.

    Example:
        >>> sorted(["step_10.pt", "step_9.pt"], key=natural_key)
        ['step_9.pt', 'step_10.pt']
    """
    parts = re.split(r"(\d+)", name)
    # The name itself decides between step_1 and step_01, which are equal as numbers.
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def in_order(path: Path) -> tuple[object, ...]:
    """Returns the key by which paths are sorted: ``epoch=1-v1.ckpt`` follows ``epoch=1.ckpt``."""
    return natural_key(stem(path.name)), path.name


def entries_of(folder: Path) -> list[Path]:
    """Returns the entries of a folder, in natural order.

    Raises:
        UsageError: it cannot be listed.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error


def _sort_entries(folder: Path) -> tuple[list[Path], dict[Path, WeightFiles], list[Path], list[Skipped]]:
    """Returns the checkpoint files, the checkpoint folders, other folders with weights, and what is skipped."""
    files, folders, models, skipped = list[Path](), dict[Path, WeightFiles](), list[Path](), list[Skipped]()
    entries = entries_of(folder)
    names = frozenset(path.name for path in entries)
    checkpoints = checkpoint_files(Folder(folder, names))
    shards = {shard for path in entries if path.name.endswith(SUFFIX) for shard in shards_of(path)}
    for path in entries:
        try:
            is_folder = path.is_dir()
            weights = find_weights(path) if is_folder else None
            if is_folder:
                reason = _reason_to_skip_folder(path, weights, names)
            else:
                reason = _reason_to_skip_file(path, is_checkpoint=path.name in checkpoints)
            if path.name in shards:
                continue
            if reason:
                skipped.append(Skipped(path, reason))
            elif weights and (names_a_moment(path.name) or ends_in_a_number(path.name)) and not _is_run(path):
                folders[path] = weights
            elif weights or (is_folder and may_have_weights(path.name) and has_weights_inside(path)):
                models.append(path)
            elif path.name in checkpoints:
                files.append(path)
            elif not is_folder and (what := other_format(path.name)):
                skipped.append(Skipped(path, f"no checkpoint, by its first bytes: {what}"))
        except (OSError, CheckpointFormatError, UsageError) as error:
            why = str(error).removeprefix(f"{path}: ").rstrip(".")
            skipped.append(Skipped(path, f"cannot be read: {why}"))
    return files, folders, models, skipped


def _is_run(folder: Path) -> bool:
    """Whether a folder with weights contains checkpoints, too, as transformers' output folder does."""
    for path in entries_of(folder):
        if _is_shard(path):
            continue  # there may be thousands of them
        is_step = (
            re.match(r"checkpoint[-_]?\d", path.name) or record_from_name(path.name, bare_number=False) != Record()
        )
        if is_step and path.is_dir() and (weights := find_weights(path)) and not weights.nested:
            return True
    return False


def _is_shard(path: Path) -> bool:
    return re.search(r"-\d+-of-\d+\.", path.name) is not None


def _without_last_file(folders: Mapping[Path, WeightFiles]) -> list[Skipped]:
    """Returns the folders that lack the file that their trainer writes last, and that others have."""

    def without_numbers(path: Path) -> str:
        return re.sub(r"\d+", "", path.name)

    skipped = []
    for trainer in TRAINERS:
        complete = {without_numbers(path) for path, weights in folders.items() if weights.kind == trainer.name}
        skipped += [
            Skipped(path, f"incomplete: it has no {trainer.written_last}, unlike the others")
            for path in folders
            if trainer.written_last and without_numbers(path) in complete and not (path / trainer.written_last).exists()
        ]
    return skipped


def _reason_to_skip_folder(path: Path, weights: WeightFiles | None, names: frozenset[str]) -> str | None:
    if path.name.startswith("."):
        return INCOMPLETE if weights else None
    if weights and is_training_state_folder(path.name):
        return TRAINING_STATE
    if path.name.startswith(UNFINISHED_FOLDERS) or UNFINISHED.fullmatch(path.name) or path.name + _MARKER in names:
        return INCOMPLETE
    return weights.problem if weights and weights.incomplete else None


def _reason_to_skip_file(path: Path, *, is_checkpoint: bool) -> str | None:
    reason = reason_to_skip(path.name, is_checkpoint=is_checkpoint)
    if reason is None and is_checkpoint:
        if not path.exists():
            return "a broken symbolic link"
        if path.is_file() and path.stat().st_size == 0:
            return "incomplete: it is empty"
    return reason


def _once(paths: Sequence[Path]) -> tuple[list[Path], list[Skipped]]:
    """Keeps one path for each stored file: a real one before a symbolic link, a number before ``last`` and ``best``."""
    chosen: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), is_alias(path.name), natural_key(path.name))):
        chosen.setdefault(identity_of(path), path)
    firsts = {path: chosen[identity_of(path)] for path in paths}
    repeated = [Skipped(path, f"the same file as {first.name}") for path, first in firsts.items() if path != first]
    return [path for path, first in firsts.items() if path == first], repeated


def identity_of(path: Path) -> tuple[int, int]:
    """Returns what tells whether two paths lead to one file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino
