"""Which paths a run may write to: the output, its checksum, and the reports and plots next to it.

Paths are checked before the work starts. A checkpoint that the run reads is never replaced.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.errors import CheckpointFormatError, OutputError, UsageError
from ckpt_avg.files.status import input_status, is_folder, stat_or_none
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.sharded import SUFFIX as INDEX_SUFFIX
from ckpt_avg.formats.sharded import is_index
from ckpt_avg.limits import LIMITS
from ckpt_avg.output.unpublished_file import publish_bytes
from ckpt_avg.runs.discover import Discovery, Sources, discover


def check_output(
    path: str | os.PathLike[str], discovery: Discovery, *, overwrite: bool, where: str | None = None
) -> Path:
    """Returns the path to write to, with symbolic links resolved.

    Args:
        path: the path that the user gave.
        discovery: the checkpoints of this run.
        overwrite: whether an existing file may be replaced.
        where: what messages call the path; by default the path itself.

    Raises:
        UsageError: the path is a folder, a device or one of the checkpoints, or its folder does not exist.
        OutputError: the file exists and ``overwrite`` is off, or its folder is not writable.
    """
    where = where or str(path)
    if not os.path.basename(path):
        raise UsageError(f"{os.fspath(path)!r}: is not a file name. Name a file, for example swa.safetensors.")
    target = Path(os.path.realpath(path))
    try:
        status, folder = stat_or_none(target), stat_or_none(target.parent)
    except OSError as error:
        raise UsageError(f"{where}: cannot be used as output: {error.strerror}. Choose another path.") from error
    if status is not None and not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise UsageError(f"{where}: is {kind}. Name a file, for example swa.safetensors.")
    if folder is None or not stat.S_ISDIR(folder.st_mode):
        raise UsageError(f"{where}: its folder {target.parent} does not exist. Create it first.")
    if status is not None:
        _refuse_checkpoint(where, status, discovery)
        if not overwrite:
            raise OutputError(f"{where}: exists already. Choose another path, or replace it with --overwrite.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{where}: its folder {target.parent} is not writable. Choose another path.")
    return target


def _refuse_checkpoint(where: str, status: os.stat_result, discovery: Discovery) -> None:
    """Raises UsageError if the file with this status belongs to any discovered checkpoint, selected or not.

    The exception is an average written by this package in a run folder: the next run may replace it.
    """
    for path in (*discovery.paths, *(each.path for each in discovery.skipped)):
        for file in itertools.islice(_files_of(path), LIMITS.files):
            other = input_status(file)
            if other is None or not os.path.samestat(other, status):
                continue
            if path in discovery.named or not _is_average(file):
                raise UsageError(f"{where}: is one of the checkpoints, {path}. Choose another path.")


def _files_of(path: Path) -> Iterator[Path]:
    """Yields the files of a checkpoint, judging by their names."""
    if is_folder(path):
        for folder, _, names in os.walk(path, onerror=_refuse_unlisted, followlinks=True):
            yield from (Path(folder) / name for name in names)
    elif is_index(path):
        yield path
        yield from (each for each in path.parent.iterdir() if re.search(r"-\d+-of-\d+\.", each.name))
    else:
        yield path


def _refuse_unlisted(error: OSError) -> NoReturn:
    raise CheckpointFormatError(f"{error.filename}: cannot be listed: {error.strerror}. Check its disk.") from error


def _is_average(path: Path) -> bool:
    try:
        with open_checkpoint(path) as checkpoint:
            return METHOD_KEY in checkpoint.spec.metadata
    except CheckpointFormatError:
        return False


def checksum_path(output: str | os.PathLike[str]) -> Path:
    """Returns the path of an output's checksum: next to the path that was given, without following links."""
    path = Path(output)
    return path.with_name(f"{path.name}.sha256")


def check_checksum(
    output: str | os.PathLike[str],
    discovery: Discovery,
    *,
    wanted: bool,
    overwrite: bool,
    notice: Callable[[str], None],
) -> Path | None:
    """Returns where to write the checksum; None if none is wanted. Raises as `check_output`."""
    path = checksum_path(output)
    if not wanted:
        if os.path.lexists(path):
            notice(f"{path} belongs to an earlier output and will not match this one: remove it, or add --sha256")
        return None
    if os.path.realpath(path) == os.path.realpath(output):
        raise UsageError(f"--sha256: {path}: is a link to the output. Remove it.")
    return check_output(path, discovery, overwrite=overwrite, where=f"--sha256: {path}")


def write_checksum(path: Path, name: str, sha256: str, *, overwrite: bool) -> None:
    """Writes the checksum, for an output of this name (without its folder).

    Raises:
        OutputError: it could not be written. The output itself is published by then.
    """
    try:
        publish_bytes(path, checksum_line(name, sha256), overwrite=overwrite)
    except OutputError as error:
        raise OutputError(f"--sha256: {error} The output itself is published.") from error


def checksum_line(name: str, sha256: str) -> bytes:
    """Returns a line as ``sha256sum`` writes it: backslashes and line breaks in the name are escaped.

    (coreutils manual, "cksum output modes")
    """
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    return f"{mark}{sha256}  ".encode() + os.fsencode(escaped) + b"\n"


class SideFiles:
    """The files that options such as ``--report`` write next to the result.

    Args:
        sources: the checkpoints, which must not be replaced.
        output: the output, which must not be replaced either; None if the command has none.
        overwrite: whether existing files may be replaced.
    """

    def __init__(self, sources: Sources, *, output: str | os.PathLike[str] | None, overwrite: bool) -> None:
        self._sources = sources
        self._overwrite = overwrite
        self._targets: dict[str, Path] = {}
        self._owners: dict[str, str] = {}
        if output is not None:
            self.reserve(output, "the output")

    def reserve(self, path: str | os.PathLike[str], owner: str) -> None:
        """Keeps a path for something else; `check` then refuses it."""
        self._owners[os.path.realpath(path)] = owner

    def check(self, option: str, path: str | os.PathLike[str] | None, suffixes: Sequence[str]) -> None:
        """Checks the path of an option's file, for `publish`. Without a path there will be no file.

        Raises:
            UsageError: it has another suffix, belongs to something else, is the name of a shard index, or is refused
                by `check_output`.
            OutputError: as `check_output`.
        """
        if path is None:
            return
        where = f"{option} {path}"
        if os.path.splitext(path)[1].lower() not in suffixes:
            example = f"{option} {option[2:]}{suffixes[0]}"
            raise UsageError(f"{where}: expected a name that ends in {' or '.join(suffixes)}, for example {example}.")
        owner = self._owners.setdefault(os.path.realpath(path), option)
        if owner != option:
            raise UsageError(f"{where}: is the path of {owner}. Choose another one.")
        if os.path.basename(path).endswith(INDEX_SUFFIX):
            raise UsageError(f"{where}: is the name of a shard index. Choose another one.")
        self._targets[option] = check_output(path, discover(self._sources), overwrite=self._overwrite, where=where)

    def publish(self, option: str, contents: Callable[[], bytes]) -> None:
        """Writes an option's file, if its path was given.

        Raises:
            OutputError: the contents could not be made, or the file could not be written.
        """
        target = self._targets.get(option)
        if target is None:
            return
        try:
            publish_bytes(target, contents(), overwrite=self._overwrite)
        except OutputError as error:
            raise OutputError(f"{option}: {error} Only this file is missing.") from error


def json_bytes(document: Mapping[str, object]) -> bytes:
    """Returns a JSON document as the contents of a file."""
    return f"{json.dumps(document, indent=2)}\n".encode()
