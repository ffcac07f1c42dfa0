"""One folder → the checkpoints on its first level, by names alone, and why the rest is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, UsageError
from ckpt_avg.formats.folder import Form, form_of
from ckpt_avg.formats.trainers.file_names import SUFFIXES, is_alias, is_average, record_from_name, stem

_BESIDE_THE_WEIGHTS = re.compile(
    r"(optimizer|scheduler|rng_state|random_states|training_args|scaler|sampler|custom_checkpoint|dl_state_dict"
    r"|distrib_optim|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states)[\d_]*\.",
    re.I,
)
_RECOVERY = re.compile(r"recovery-\d+-\d+\.pth\.tar")
_AVERAGED = "an earlier average, by its name"
_UNFINISHED = (".tmp", ".part", ".incomplete")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder of a run folder that is not averaged, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
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


@dataclass(slots=True)
class _Entries:
    """The entries of a folder by what they seem to be: files, checkpoint folders, other folders with weights."""

    files: list[Path] = field(default_factory=list)
    folders: list[tuple[Path, Form]] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def list_folder(folder: Path) -> Listing:
    """Lists the first level of a folder.

    Raises:
        UsageError: it cannot be listed.
    """
    own = _form_of(folder)
    if own is not None and own.inside(folder) and own.reader not in ("refused", "half-written"):
        return Listing((folder,), False)  # its weights are in a folder inside, which is no run
    found = _sort_entries(folder)
    files, skipped = found.files, found.skipped
    if own is not None:
        taken = {own.target.name, *own.others}
        files = [path for path in files if path.name not in taken and not _is_shard(path)]
        # Only what has a number beside them makes the folder's own weights those of a whole run.
        if not found.folders and not any(map(_numbered, files)):
            return Listing((folder,), False)
        whole = "the weights of the whole run beside its checkpoints: one of them, or the final"
        skipped.append(Skipped(own.target, own.problem or whole))
    unfinished = _without_state(found.folders)
    skipped += [Skipped(path, "half-written: it has no trainer_state.json, as the others have") for path in unfinished]
    kept, repeated = _once([*(path for path, _ in found.folders if path not in unfinished), *files])
    skipped += repeated
    if kept:
        known = {identity_of(path): path.name for path in kept}
        for path in found.models:
            same = known.get(identity_of(path))
            skipped.append(Skipped(path, f"the same file as {same}" if same else "a model or a run of its own"))
    named = [path for path in kept if not is_alias(path.name)]
    if any(item.reason == _AVERAGED for item in skipped) and not named:
        skipped += [Skipped(path, "last, best or the like by its name") for path in kept]
        kept = []  # else only an alias of these would be left
    if named:
        reason = "last, best or the like by its name, beside checkpoints with names of their own"
        skipped += [Skipped(path, reason) for path in kept if path not in named]
        kept = named
    return Listing(tuple(sorted(kept, key=in_order)), True, tuple(skipped))


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
    """Returns the key by which paths are sorted: ``epoch=1-v1.ckpt`` comes behind ``epoch=1.ckpt``."""
    return natural_key(stem(path.name)), path.name


def entries_of(folder: Path) -> list[Path]:
    """Returns what a folder holds, in natural order.

    Raises:
        UsageError: it cannot be listed.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error


def _sort_entries(folder: Path) -> _Entries:
    found = _Entries()
    for path in entries_of(folder):
        try:
            is_folder = path.is_dir()
            form = form_of(path) if is_folder else None
            is_candidate = form is not None and _numbered(path) and not _is_run(path)
            reason = None if is_folder else _reason_to_skip(path)
        except (OSError, CheckpointFormatError, UsageError) as error:
            why = str(error).removeprefix(f"{path}: ").rstrip(".")
            found.skipped.append(Skipped(path, f"cannot be looked into: {why}"))
            continue
        if is_folder and (path.name.startswith(("tmp-", ".")) or path.name.endswith(_UNFINISHED)):
            if form is not None or not path.name.startswith("."):
                found.skipped.append(Skipped(path, "half-written, by its name"))
        elif form is not None and form.reader == "half-written":
            found.skipped.append(Skipped(path, form.problem))
        elif form is not None and is_candidate:
            found.folders.append((path, form))
        elif form is not None:
            found.models.append(path)
        elif reason is not None:
            found.skipped.append(Skipped(path, reason))
        elif not is_folder and path.name.lower().endswith(SUFFIXES):
            found.files.append(path)
    return found


def _numbered(path: Path) -> bool:
    """Whether a name tells a step, an epoch or a metric."""
    return record_from_name(path.name) != Record()


def _is_run(folder: Path) -> bool:
    """Whether a folder with weights of its own holds checkpoints, too, as transformers' output folder does."""
    for path in entries_of(folder):
        if _is_shard(path):
            continue  # there may be thousands of them
        is_step = (
            re.match(r"checkpoint[-_]?\d", path.name) or record_from_name(path.name, bare_number=False) != Record()
        )
        if is_step and path.is_dir() and (form := form_of(path)) is not None and form.kind != "DeepSpeed":
            return True
    return False


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
        return _AVERAGED
    if path.is_file() and path.stat().st_size == 0:
        return "half-written: it is empty"
    return None


def _once(paths: Sequence[Path]) -> tuple[list[Path], list[Skipped]]:
    """Keeps one path for each stored file: a real one before a symbolic link, a number before ``last`` and ``best``."""
    chosen: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), is_alias(path.name), natural_key(path.name))):
        chosen.setdefault(identity_of(path), path)
    kept = [path for path in paths if chosen[identity_of(path)] == path]
    repeated = [
        Skipped(path, f"the same file as {chosen[identity_of(path)].name}")
        for path in paths
        if chosen[identity_of(path)] != path
    ]
    return kept, repeated


def identity_of(path: Path) -> tuple[int, int]:
    """Returns what tells whether two paths lead to one file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino
