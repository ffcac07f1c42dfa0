"""Sources → checkpoints, by names alone.

A checkpoint named by hand stays where it was named. A run folder gives its checkpoint files and checkpoint folders in
natural order (``step_9`` before ``step_10``), each stored file once; what was left out is kept with its reason. What
the checkpoints themselves tell is looked at later (`survey`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, UsageError
from ckpt_avg.limits import LIMITS
from ckpt_avg.messages import listing, quote
from ckpt_avg.readers.file_names import SUFFIXES, is_alias, is_average, record_from_name, stem
from ckpt_avg.readers.folders import Form, form_of
from ckpt_avg.record import Record

_BESIDE_THE_WEIGHTS = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|training_args|scaler|sampler|custom_checkpoint|dl_state_dict"
    r"|distrib_optim|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states)[\d_]*\.",
    re.I,
)
_RECOVERY = re.compile(r"recovery-\d+-\d+\.pth\.tar")
_UNFINISHED = (".tmp", ".part", ".incomplete")
_DEEPEST = 3  # folders inside a run folder that are searched where it holds no checkpoint itself

# One path, or several.
Sources = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder of a run folder that is not averaged, and why."""

    path: Path
    reason: str


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
        identity = _identity(path)
        if identity in seen:
            raise UsageError(
                f"{path}: the same checkpoint is named twice (also as {seen[identity]}), so it would count double. "
                "Name it once."
            )
        seen[identity] = path
    return Discovery(tuple(groups), tuple(skipped), tuple(notes))


def natural_key(name: str) -> tuple[tuple[object, ...], str]:
    """Returns a sort key that compares runs of digits as numbers.

    Example:
        >>> sorted(["step_10.pt", "step_9.pt"], key=natural_key)
        ['step_9.pt', 'step_10.pt']
    """
    parts = re.split(r"(\d+)", name)
    # The name itself decides between step_1 and step_01, which are equal as numbers.
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def entries_of(folder: Path) -> list[Path]:
    """Returns what a folder holds, in natural order.

    Raises:
        UsageError: it cannot be listed.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error


def _existing(original: str | os.PathLike[str]) -> Path:
    source = Path(original)
    if not os.fspath(original):
        raise UsageError("expected the path of a checkpoint file or a run folder, got an empty one. Check the command.")
    try:
        exists = source.exists()
    except (OSError, ValueError) as error:  # no permission, a name too long or with NUL
        raise UsageError(f"{quote(source)}: cannot be looked at: {error}. Check the path.") from error
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
    found = _list_folder(folder)
    if found.groups or depth == 0:
        return found if found.groups else None
    inner = []
    left_out = {item.path for item in found.skipped}
    for path in entries_of(folder):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and path not in left_out:
            inside = _search(path, depth - 1, visits)
            if inside is not None:
                inner.append((path, inside))
    if len(inner) > 1:
        raise IncompatibleError(
            f"{folder}: expected the checkpoints of one run, got {len(inner)} folders that hold some: "
            f"{listing(quote(path.relative_to(folder)) for path, _ in inner)}. Name one of them."
        )
    if not inner:
        return None
    path, inside = inner[0]
    return Discovery(
        inside.groups, (*found.skipped, *inside.skipped), inside.notes or (f"the checkpoints are in {path}",)
    )


def _list_folder(folder: Path) -> Discovery:
    """Lists the first level of a folder."""
    own = _form_of(folder)
    if own is not None and own.inside(folder) and own.reader not in ("refused", "half-written"):
        return Discovery((Group((folder,), False),))  # its weights are in a folder inside, which is no run
    skipped: list[Skipped] = []
    files: list[Path] = []
    folders: list[tuple[Path, Form]] = []
    for path in entries_of(folder):
        if path.is_dir():
            form = _form_of(path)
            if path.name.startswith(("tmp-", ".")) or path.name.endswith(_UNFINISHED):
                if form is not None or not path.name.startswith("."):
                    skipped.append(Skipped(path, "half-written, by its name"))
            elif form is not None and form.reader == "half-written":
                skipped.append(Skipped(path, form.problem))
            elif form is not None:
                folders.append((path, form))
        elif (reason := _reason_to_skip(path)) is not None:
            skipped.append(Skipped(path, reason))
        elif path.name.lower().endswith(SUFFIXES):
            files.append(path)
    if own is not None:
        taken = {own.target.name, *own.others} if own.reader in ("file", "index") else {path.name for path in files}
        rest = [path for path in files if path.name not in taken and not _is_shard(path)]
        # Only what has a number beside them makes the folder's own weights those of a whole run.
        if not any(record_from_name(path.name) != Record() for path in (*(path for path, _ in folders), *rest)):
            return Discovery((Group((folder,), False),))
        files = rest
        skipped.append(
            Skipped(own.target, "the weights of the whole run beside its checkpoints: one of them, or the final")
        )
    unfinished = _without_state(folders)
    skipped += [Skipped(path, "half-written: it has no trainer_state.json, as the others have") for path in unfinished]
    kept, repeated = _once([*(path for path, _ in folders if path not in unfinished), *files])
    skipped += repeated
    named = [path for path in kept if not is_alias(path.name)]
    if named:
        skipped += [
            Skipped(path, "last, best or the like by its name, beside checkpoints with names of their own")
            for path in kept
            if path not in named
        ]
        kept = named
    kept.sort(key=lambda path: natural_key(path.name))
    return Discovery((Group(tuple(kept), True),) if kept else (), tuple(skipped))


def _form_of(folder: Path) -> Form | None:
    try:
        return form_of(folder)
    except CheckpointFormatError as error:
        raise UsageError(str(error)) from error


def _is_shard(path: Path) -> bool:
    return re.search(r"-\d+-of-\d+\.", path.name) is not None


def _without_state(folders: Sequence[tuple[Path, Form]]) -> list[Path]:
    """Returns transformers' checkpoint folders that lack what the others have, which is written last."""
    trainer = [path for path, form in folders if form.kind == "HF Trainer"]
    return [
        path for path, form in folders if trainer and form.kind is None and re.fullmatch(r"checkpoint-\d+", path.name)
    ]


def _reason_to_skip(path: Path) -> str | None:
    """Returns why a file is no checkpoint of the run, by its name; None where nothing speaks against it."""
    name = path.name
    if name.endswith(_UNFINISHED):
        return "half-written, by its name"
    if name.endswith(".nemo"):
        return "a NeMo archive, packed from a checkpoint (tar xf unpacks it)"
    if not name.lower().endswith(SUFFIXES):
        return None
    if not path.exists():
        return "a symbolic link to nothing"
    if _BESIDE_THE_WEIGHTS.match(name):
        return "training state beside the weights, by its name"
    if name.startswith("."):
        return "hidden, by its name"
    if _RECOVERY.fullmatch(name):
        return "a recovery file from the middle of an epoch, by its name"
    if re.fullmatch(r"init(ial)?", stem(name), re.I):
        return "the weights before training, by its name"
    if is_average(name):
        return "an earlier average, by its name"
    if path.is_file() and path.stat().st_size == 0:
        return "half-written: it is empty"
    return None


def _once(paths: Sequence[Path]) -> tuple[list[Path], list[Skipped]]:
    """Keeps one path for each stored file: a real one before a symbolic link, a number before ``last`` and ``best``."""
    chosen: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), is_alias(path.name), natural_key(path.name))):
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


def _nothing(folder: Path) -> str:
    """Says what a folder without checkpoints holds instead."""
    message = f"{folder}: expected checkpoint files ({', '.join(SUFFIXES)}) or checkpoint folders, got none"
    skipped = _list_folder(folder).skipped
    if skipped:
        message += ": " + listing((f"{quote(item.path.name)} is {item.reason}" for item in skipped), separator="; ")
    inner = [path.name for path in entries_of(folder) if path.is_dir() and not path.name.startswith(".")]
    if inner:
        message += f". It holds the folders {listing(map(quote, inner))}, and no checkpoint in them either"
    return f"{message}. Name a folder or files that hold some."
