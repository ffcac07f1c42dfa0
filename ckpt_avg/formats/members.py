"""Files that another file names: each must lie in the same folder, whatever the name says."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.text import quote


def member_of(folder: Path, name: object, where: str) -> Path:
    """Returns the path of a file that an index names.

    A symbolic link may lead out of the folder only in the way of the Hugging Face cache, where
    ``snapshots/<revision>/<file>`` points into ``blobs``.

    Args:
        folder: the folder of the index.
        name: the untrusted name.
        where: what to name in errors.

    Raises:
        CheckpointFormatError: the name, or the link of that name, leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0:"):
        raise CheckpointFormatError(
            f"{where}: expected the name of a file beside it, got {quote(name)}. Don't trust it."
        )
    path = folder / name
    try:
        is_link = path.is_symlink()
    except (OSError, ValueError) as error:  # a name that is too long, or no text
        raise CheckpointFormatError(f"{where}: {quote(name)} cannot be the name of a file. Don't trust it.") from error
    if is_link:
        try:
            target = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            raise CheckpointFormatError(
                f"{where}: {quote(name)} is a symbolic link that cannot be followed: {error.strerror}. Copy the file."
            ) from error
        real = Path(os.path.realpath(folder))
        cached = real.parent.name == "snapshots" and target.parent == real.parent.parent / "blobs"
        if real not in target.parents and not cached:
            raise CheckpointFormatError(
                f"{where}: {quote(name)} is a symbolic link out of the folder, to {quote(target)}. Copy the file."
            )
    return path
