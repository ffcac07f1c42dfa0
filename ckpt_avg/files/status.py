"""`stat` helpers that distinguish a missing file from one that could not be checked."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError

_NONE = (errno.ENOENT, errno.ENOTDIR)
_NO_NAME = (errno.ELOOP, errno.ENAMETOOLONG)  # no file can have it


def stat_or_none(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Returns the status of what a path leads to, or None if there is nothing.

    Raises:
        OSError: the system cannot say. A file that is wrongly reported as missing might be replaced or skipped.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise


def input_status(path: Path) -> os.stat_result | None:
    """Returns the status of an input, or None if there is nothing.

    Raises:
        CheckpointFormatError: the system cannot tell.
    """
    try:
        return stat_or_none(path)
    except OSError as error:
        if error.errno in _NO_NAME:
            return None
        raise CheckpointFormatError(f"{path}: cannot be checked: {error.strerror}. Check its disk.") from error


def is_folder(path: Path) -> bool:
    """Whether there is a folder; raises CheckpointFormatError if the system cannot tell."""
    status = input_status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_file(path: Path) -> bool:
    """Whether there is a regular file; raises CheckpointFormatError if the system cannot tell."""
    status = input_status(path)
    return status is not None and stat.S_ISREG(status.st_mode)
