"""Looks at the file system that tell "there is none" from "the system could not say"."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError

_NONE = (errno.ENOENT, errno.ENOTDIR)
_NO_NAME = (errno.ELOOP, errno.ENAMETOOLONG)  # no file can have it


def look(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Returns the status of what a path leads to; None where it leads to nothing.

    Raises:
        OSError: the system could not say. A file that is taken for missing then might be replaced, or left out.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise


def is_folder(path: Path) -> bool:
    """Whether there is a folder.

    Raises:
        CheckpointFormatError: the system could not say.
    """
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Whether there is a regular file.

    Raises:
        CheckpointFormatError: the system could not say.
    """
    return stat.S_ISREG(_mode(path))


def status_of(path: Path) -> os.stat_result | None:
    """Returns the status of what an input's path leads to; None where it leads to nothing.

    Raises:
        CheckpointFormatError: the system could not say.
    """
    try:
        return look(path)
    except OSError as error:
        if error.errno in _NO_NAME:
            return None
        raise CheckpointFormatError(f"{path}: cannot be looked at: {error.strerror}. Check its disk.") from error


def _mode(path: Path) -> int:
    status = status_of(path)
    return 0 if status is None else status.st_mode
