"""Files beside the output: a report, a picture. Checked before the work, and published at once like the output."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_avg.atomic import atomic_output, check_target
from ckpt_avg.discover import Sources, discover
from ckpt_avg.errors import UsageError
from ckpt_avg.inputs import refuse_output_among


def check_side_file(
    option: str,
    path: str | os.PathLike[str],
    sources: Sources,
    *,
    beside: str | os.PathLike[str] | None,
    overwrite: bool,
) -> Path:
    """Returns where a file will be written.

    Args:
        option: which option named it.
        path: the file.
        sources: the checkpoints, none of which it may replace.
        beside: the output, which it must not be.
        overwrite: whether it may replace a file.

    Raises:
        UsageError: it is the output, a checkpoint or a folder, or its folder does not exist.
        OutputError: it exists and ``overwrite`` is off, or its folder cannot be written.
    """
    if beside is not None and os.path.realpath(path) == os.path.realpath(beside):
        raise UsageError(f"{option} {path}: expected another file than the output. Choose another path.")
    refuse_output_among(path, discover(sources))
    return check_target(path, overwrite=overwrite)


def publish_side_file(target: Path, contents: bytes, *, overwrite: bool) -> None:
    """Writes a whole file, or nothing.

    Raises:
        OutputError: it could not be written.
    """
    with atomic_output(target, len(contents)) as unpublished:
        unpublished.write(contents, 0)
        unpublished.publish(overwrite=overwrite)
