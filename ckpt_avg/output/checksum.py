"""The file ``OUT.sha256`` beside an output, which ``sha256sum -c`` understands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.output.paths import refuse_output_among
from ckpt_avg.output.target import check_target
from ckpt_avg.output.unpublished_file import atomic_output
from ckpt_avg.runs.discover import Discovery

SUFFIX = ".sha256"


def checksum_path(output: str | os.PathLike[str]) -> Path:
    """Returns where the checksum of an output belongs: beside the name that was given, symbolic links not followed."""
    path = Path(output)
    return path.with_name(path.name + SUFFIX)


def check_checksum(
    output: str | os.PathLike[str],
    discovery: Discovery,
    *,
    wanted: bool,
    overwrite: bool,
    notice: Callable[[str], None],
) -> Path | None:
    """Returns where to write the checksum, if one is wanted.

    Raises:
        UsageError: the path is a folder, a device or one of the checkpoints.
        OutputError: it exists and ``overwrite`` is off, or its folder cannot be written.
    """
    path = checksum_path(output)
    if not wanted:
        if os.path.lexists(path):
            notice(f"{path} is of an earlier output and will not fit this one: remove it, or add --sha256")
        return None
    if os.path.realpath(path) == os.path.realpath(output):
        raise UsageError(f"--sha256: {path}: expected a path of its own, got a link to the output. Remove it.")
    try:
        refuse_output_among(path, discovery)
        return check_target(path, overwrite=overwrite)
    except UsageError as error:
        raise UsageError(f"--sha256: {error}") from error
    except OutputError as error:
        raise OutputError(f"--sha256: {error}") from error


def write_checksum(path: Path, name: str, sha256: str, *, overwrite: bool) -> None:
    """Writes the checksum file, whole or not at all.

    Args:
        path: where.
        name: of the output, without its folder.
        sha256: of the output, in hex.
        overwrite: whether it may replace another.

    Raises:
        OutputError: it could not be written; the output is published all the same.
    """
    contents = checksum_line(name, sha256)
    try:
        with atomic_output(path, len(contents)) as unpublished:
            unpublished.write(contents, 0)
            unpublished.publish(overwrite=overwrite)
    except OutputError as error:
        raise OutputError(f"--sha256: {error} All else was done: the output is published.") from error


def checksum_line(name: str, sha256: str) -> bytes:
    """Returns a line as ``sha256sum`` writes it: where the name holds a backslash or a line's end, these are escaped.

    (coreutils manual, "cksum output modes")
    """
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if escaped != name else ""
    return f"{mark}{sha256}  ".encode() + os.fsencode(escaped) + b"\n"
