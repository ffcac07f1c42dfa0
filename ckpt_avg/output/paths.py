"""Where files may be written: never over a checkpoint that is read."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.errors import CheckpointFormatError, UsageError
from ckpt_avg.files.status import input_status, is_folder, stat_or_none
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.sharded import is_index
from ckpt_avg.limits import LIMITS
from ckpt_avg.runs.discover import Discovery


def refuse_output_among(output: str | os.PathLike[str], discovery: Discovery) -> None:
    """Raises UsageError where the output would replace a file of any discovered checkpoint, selected or not.

    An average that was made here and lies in a run folder is no such file, so that the folder can hold the output of
    the run before.
    """
    try:
        status = stat_or_none(output)
    except OSError as error:
        raise UsageError(f"{output}: cannot be used as output: {error.strerror}. Choose another path.") from error
    if status is None:
        return
    for path in (*discovery.paths, *(each.path for each in discovery.skipped)):
        for file in itertools.islice(_files_of(path), LIMITS.files):
            if _is(file, status) and not (path not in discovery.named and _made_here(file)):
                raise UsageError(
                    f"{output}: expected a new file, got one of the checkpoints, {path}. Choose another path."
                )


def _files_of(path: Path) -> Iterator[Path]:
    """Yields the files that a checkpoint consists of, as far as names tell."""
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


def _is(file: Path, status: os.stat_result) -> bool:
    other = input_status(file)
    return other is not None and os.path.samestat(other, status)


def _made_here(path: Path) -> bool:
    try:
        with open_checkpoint(path) as checkpoint:
            return METHOD_KEY in checkpoint.spec.metadata
    except CheckpointFormatError:
        return False
