"""Which folder a run may write: a new or empty one, or with ``--overwrite`` one that this package wrote."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.errors import CheckpointFormatError, OutputError, ResourceError, UsageError
from ckpt_avg.files import platform
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import stat_or_none
from ckpt_avg.formats.safetensors_header import matches, parse_header, read_header
from ckpt_avg.limits import LIMITS
from ckpt_avg.output.paths import nearest_folder, refuse_read_only
from ckpt_avg.output.provenance import recorded_files
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.text import listing, quote
from ckpt_avg.wording import setting


def names_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an output is a folder: the path ends in ``/``, or a folder is there."""
    text = os.fspath(path)
    return text.endswith(tuple(filter(None, (os.sep, os.altsep)))) or os.path.isdir(text)


def check_folder(path: str | os.PathLike[str], discovery: Discovery, *, overwrite: bool) -> Path:
    """Returns the folder to write, with symbolic links resolved.

    Args:
        path: the path that the user gave.
        discovery: the checkpoints of this run.
        overwrite: whether an older output folder may be replaced.

    Raises:
        UsageError: something else is there, or the folder contains checkpoints of this run or is in one of them.
        OutputError: the folder is not empty and may not be replaced, or that around it is not writable.
    """
    where = str(path)
    target = Path(os.path.realpath(path))
    try:
        status = stat_or_none(target)
    except OSError as error:
        raise UsageError(f"{where}: cannot be used as output: {error.strerror}. Choose another path.") from error
    if target.suffix == ".safetensors" and status is None:
        raise UsageError(f"{where}: ends in /, so it is a folder. For a file, use {setting('-o', where.rstrip('/'))}.")
    if status is not None and not os.path.isdir(target):
        raise UsageError(f"{where}: is no folder. Choose another path.")
    _refuse_checkpoints(where, target, discovery)
    is_mounted = platform.is_mount_point(target)
    if is_mounted or _is_current(target):
        what = "is a mount point" if is_mounted else "is the current folder, or contains it"
        inside = os.path.join(where, "release", "")
        raise UsageError(f"{where}: {what}, so it cannot be replaced in one step. Use {setting('-o', inside)}.")
    folder = nearest_folder(target, where)
    refuse_read_only(folder, where)
    if status is not None:
        refuse_foreign(target, where, overwrite=overwrite)
    return target


def _is_current(folder: Path) -> bool:
    try:
        current = Path.cwd()
    except FileNotFoundError:  # it was removed
        return False
    return folder == current or folder in current.parents


def _refuse_checkpoints(where: str, target: Path, discovery: Discovery) -> None:
    for path in discovery.paths:
        real = Path(os.path.realpath(path))
        if target == real:
            raise UsageError(f"{where}: is one of the checkpoints. Leave it out of them, or choose another folder.")
        if target in real.parents:
            raise UsageError(f"{where}: contains the checkpoint {path}. Choose another folder.")
        if real in target.parents:
            raise UsageError(f"{where}: is in the checkpoint {path}. Choose another folder.")


def refuse_foreign(folder: Path, where: str, *, overwrite: bool) -> None:
    """Raises OutputError if a folder contains something, unless it may be replaced and this package wrote all of it."""
    try:
        found = list(itertools.islice(entries(folder), LIMITS.files))
    except OSError as error:
        raise OutputError(f"{where}: cannot be listed: {error.strerror}. Choose another path.") from error
    if not found:
        return
    written = written_files(folder, found)
    others = [name for name in found if name not in written]
    if not others and overwrite:
        return
    if not others:
        raise OutputError(f"{where}: exists already. Choose another folder, or replace it with --overwrite.")
    shown = others if written else dict.fromkeys(name.partition("/")[0] for name in others)
    what = f"is not empty: it contains {listing(map(quote, shown))}"
    if written:
        raise OutputError(f"{where}: {what}, which ckpt-avg did not write. Move it away, or choose another folder.")
    name = os.path.join(where, "swa.safetensors")
    raise OutputError(f"{where}: {what}. Choose another folder, or name a file in it: {setting('-o', name)}.")


def written_files(folder: Path, names: Sequence[str]) -> set[str]:
    """Returns what this package wrote in a folder, as the weights in it record; empty if it did not write them."""
    written: set[str] = set()
    for name in names:
        files = recorded_files(_metadata(folder / name)) if name.endswith(".safetensors") else {}
        # The weights may be deeper than the folder: their own name says where they were.
        for each in files:
            if name == each:
                written |= set(files)
    return written


def entries(folder: Path) -> Iterator[str]:
    """Yields what is in a folder, and in those inside it: names relative to it, with ``/``."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            yield Path(place, name).relative_to(folder).as_posix()
        if not folders and not files and Path(place) != folder:
            yield f"{Path(place).relative_to(folder).as_posix()}/"


def _metadata(path: Path) -> Mapping[str, Any]:
    """Returns the metadata of a file that this package wrote; empty if it is none."""
    try:
        with InputFile(path, reserve=0) as file:
            if not matches(file.read(0, min(file.size, 9))):
                return {}
            metadata = parse_header(file, read_header(file))[1]
    except (CheckpointFormatError, ResourceError):
        return {}
    return metadata if METHOD_KEY in metadata else {}
