"""Which paths a run may write to: the output, its checksum, and the reports and plots next to it.

Paths are checked before the work starts. A checkpoint that the run reads is never replaced.
"""

from __future__ import annotations

import contextlib
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
from ckpt_avg.files.missing import is_remote
from ckpt_avg.files.status import input_status, is_folder, stat_or_none
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.sharded import SUFFIX as INDEX_SUFFIX
from ckpt_avg.formats.sharded import is_index
from ckpt_avg.formats.trainers.name_patterns import NO_CHECKPOINTS, OTHER_FORMATS, SUFFIXES
from ckpt_avg.limits import LIMITS
from ckpt_avg.output.unpublished_file import publish_bytes
from ckpt_avg.runs.discover import Discovery, Sources, discover
from ckpt_avg.text import quote
from ckpt_avg.wording import setting

MARK = "ckpt_avg"  # the first key of a report
HTML_MARK = b"<!DOCTYPE html>\n<!-- a report of ckpt-avg -->\n"  # the first bytes of a report as a page
REPORTS = (".json", ".html")

# Suffixes of other formats. Loaders go by them, and so do people.
_OTHERS = frozenset((*SUFFIXES, *NO_CHECKPOINTS, *OTHER_FORMATS)) - {".safetensors"}


def check_output(path: str | os.PathLike[str], discovery: Discovery, *, overwrite: bool) -> Path:
    """Returns the path to write to, with symbolic links resolved. A missing folder is created when the file is.

    Args:
        path: the path that the user gave.
        discovery: the checkpoints of this run.
        overwrite: whether an existing file may be replaced.

    Raises:
        UsageError: the path is a folder, a device or one of the checkpoints, has the suffix of another format, or is
            below a file.
        OutputError: the file exists and ``overwrite`` is off, or its folder is not writable.
    """
    target = check_target(path, str(path), discovery)
    for each in (Path(path), target):
        if each.suffix.lower() in _OTHERS:
            stem = each
            while stem.suffix.lower() in _OTHERS:
                stem = stem.with_suffix("")
            name = f"{stem.name.removesuffix('.index').removesuffix('.safetensors')}.safetensors"
            raise UsageError(
                f"{path}: {each.suffix} is the suffix of another format, and the output is a safetensors file. Use "
                f"{setting('-o', stem.with_name(name))}."
            )
    if not overwrite:
        _refuse_existing(target, str(path))
    return target


def _refuse_existing(target: Path, where: str) -> None:
    if os.path.lexists(target):
        raise OutputError(f"{where}: exists already. Choose another path, or replace it with --overwrite.")


def check_target(path: str | os.PathLike[str], where: str, discovery: Discovery) -> Path:
    """As `check_output`, for a new or existing file of any format; messages call the path ``where``."""
    if os.fspath(path) == "-":
        raise UsageError("-: the output cannot go to stdout. Name a file, for example swa.safetensors.")
    if os.path.basename(path) in ("", ".safetensors"):
        raise UsageError(f"{os.fspath(path)!r}: is not a file name. Name a file, for example swa.safetensors.")
    if is_remote(path):
        raise UsageError(
            f"{where}: is not on this machine. Write a file here, and copy it: {setting('-o', 'swa.safetensors')}"
        )
    target = Path(os.path.realpath(path))
    try:
        status = stat_or_none(path) or stat_or_none(target)  # realpath does not follow /dev/stdout to a pipe
    except OSError as error:
        raise UsageError(f"{where}: cannot be used as output: {error.strerror}. Choose another path.") from error
    if status is not None and not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise UsageError(f"{where}: is {kind}. Name a file, for example swa.safetensors.")
    folder = nearest_folder(target, where)
    if status is not None:
        _refuse_checkpoint(where, status, discovery)
    refuse_read_only(folder, where)
    return target


def nearest_folder(target: Path, where: str) -> Path:
    """Returns the folder of an output, or the nearest one around it that exists.

    Raises:
        UsageError: there is a file instead, or the path has signs that a shell would have replaced.
    """
    try:
        folder, status = next((each, found) for each in target.parents if (found := stat_or_none(each)))
    except OSError as error:
        raise UsageError(f"{where}: cannot be used as output: {error.strerror}. Choose another path.") from error
    for name in target.relative_to(folder).parts[:-1]:
        if re.match(r"~|\$\w|\$\{", name):
            raise UsageError(f"{where}: the shell did not expand {quote(name)}. Write the path of the folder in full.")
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{where}: {folder} is not a folder. Choose another path.")
    return folder


def refuse_read_only(folder: Path, where: str) -> None:
    """Raises OutputError if nothing can be created in a folder."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{where}: its folder {folder} is not writable. Choose another path.")


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
    where = f"--sha256: {path}"
    target = check_target(path, where, discovery)
    if not overwrite:
        _refuse_existing(target, where)
    return target


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
        output: the output, which must not be replaced either, nor get files inside it; None if the command has none.
        overwrite: whether existing files may be replaced.
    """

    def __init__(self, sources: Sources, *, output: str | os.PathLike[str] | None, overwrite: bool) -> None:
        self._sources = sources
        self._overwrite = overwrite
        self._output = None if output is None else Path(os.path.realpath(output))
        self._targets: dict[tuple[str, str], tuple[Path, bool]] = {}  # and whether an old file may be replaced
        self._owners: dict[str, str] = {}
        if output is not None:
            self.reserve(output, "the output")

    def reserve(self, path: str | os.PathLike[str], owner: str) -> None:
        """Keeps a path for something else; `check` then refuses it."""
        self._owners[os.path.realpath(path)] = owner

    def check(self, option: str, path: str | os.PathLike[str] | None, suffixes: Sequence[str]) -> None:
        """Checks the path of an option's file, for `publish`. Without a path there will be no file.

        An earlier report may always be replaced; a JSON file or a page that is none, never.

        Raises:
            UsageError: it has another suffix, belongs to something else, is the name of a shard index, is in the output
                folder, or is refused by `check_output`.
            OutputError: as `check_output`.
        """
        if path is None:
            return
        where = f"{option} {path}"
        if os.path.splitext(path)[1].lower() not in suffixes:
            example = f"{option} {option[2:]}{suffixes[0]}"
            raise UsageError(f"{where}: expected a name that ends in {' or '.join(suffixes)}, for example {example}.")
        owner = self._owners.setdefault(os.path.realpath(path), where)
        if owner != where or (option, str(path)) in self._targets:
            raise UsageError(f"{where}: is the path of {owner}. Choose another one.")
        if os.path.basename(path).endswith(INDEX_SUFFIX):
            raise UsageError(f"{where}: is the name of a shard index. Choose another one.")
        target = check_target(path, where, discover(self._sources))
        if self._output is not None and target.is_relative_to(self._output):
            raise UsageError(f"{where}: is in the output folder. Choose a path next to it.")
        is_report = os.path.splitext(path)[1].lower() in REPORTS
        replaces = _is_report(target) if is_report else self._overwrite
        if is_report and target.exists() and not replaces:
            raise OutputError(f"{where}: exists already, and is not a report of ckpt-avg. Choose another path.")
        if not replaces:
            _refuse_existing(target, where)
        self._targets[option, str(path)] = target, replaces

    def publish(self, option: str, path: str | os.PathLike[str] | None, contents: Callable[[], bytes]) -> None:
        """Writes an option's file, if its path was given.

        Raises:
            OutputError: the contents could not be made, or the file could not be written.
        """
        if path is None:
            return
        target, replaces = self._targets[option, str(path)]
        if os.path.splitext(path)[1].lower() in REPORTS:
            replaces &= _is_report(target)  # something else may have replaced it during the work
        try:
            publish_bytes(target, contents(), overwrite=replaces)
        except OutputError as error:
            raise OutputError(f"{option}: {error} Only this file is missing.") from error


def _is_report(path: Path) -> bool:
    """Whether there is a report of this package: a document or a page, by its first bytes."""
    marks = (HTML_MARK, json_bytes({MARK: ""}).partition(b": ")[0])
    if not path.is_file():
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(max(map(len, marks))).startswith(marks)
    return False


def json_bytes(document: Mapping[str, object]) -> bytes:
    """Returns a JSON document as the contents of a file."""
    return f"{json.dumps(document, indent=2)}\n".encode()
