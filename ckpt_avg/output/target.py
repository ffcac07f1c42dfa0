"""Where the output may go: the checks of its path that need no data."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.files.status import stat_or_none


def check_target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Returns the path to write to, symbolic links followed, after the checks that need no data.

    Raises:
        UsageError: the path is a folder or a device, or its folder does not exist.
        OutputError: it exists and ``overwrite`` is off, or its folder cannot be written.
    """
    if not os.path.basename(path):
        raise UsageError(
            f"{os.fspath(path)!r}: expected a path for a new file. Name a file, for example swa.safetensors."
        )
    target = Path(os.path.realpath(path))
    try:
        status, folder = stat_or_none(target), stat_or_none(target.parent)
    except OSError as error:
        raise UsageError(f"{path}: cannot be used as output: {error.strerror}. Choose another path.") from error
    if status is not None and not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise UsageError(
            f"{path}: expected a path for a new file, got {kind}. Name a file, for example swa.safetensors."
        )
    if folder is None or not stat.S_ISDIR(folder.st_mode):
        raise UsageError(f"{path}: its folder {target.parent} does not exist. Create it first.")
    if status is not None and not overwrite:
        raise OutputError(f"{path}: exists already. Choose another path, or replace it with --overwrite.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder {target.parent} is not writable. Choose another path.")
    return target
