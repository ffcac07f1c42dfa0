"""The unpublished output of several ranks: one file, which each of them fills in part."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import CheckpointFormatError, OutputError
from ckpt_avg.output.unpublished_file import UnpublishedFile, atomic_output

_TOKEN = 8  # bytes; no safetensors file is shorter


@contextlib.contextmanager
def shared_output(target: Path, size: int, ranks: Ranks) -> Iterator[UnpublishedFile]:
    """Yields the same unpublished file on every rank; unless rank 0 publishes it, it vanishes.

    It has a hidden name beside the output. Any rank that is left when the work fails removes it, so that it stays only
    where all of them are killed at once.

    Raises:
        OutputError: the folder cannot be written, has no room, or is not the same one for all ranks.
        RankError: another rank failed.
    """
    if ranks.size == 1:
        with atomic_output(target, size) as unpublished:
            yield unpublished
        return
    file = UnpublishedFile(target)
    try:
        with ranks.telling():  # before the file is closed, and removed
            try:
                _open(file, size, ranks)
                yield file
            except (OutputError, CheckpointFormatError, OSError):
                # Where another rank has failed, the others remove the file, perhaps before the news is here, and what
                # that leads to is not the cause.
                ranks.check(wait=True)
                raise
    finally:
        file.close()


def _open(file: UnpublishedFile, size: int, ranks: Ranks) -> None:
    # The name is known everywhere before there is a file of that name, so that any rank can remove it.
    name, expected = ranks.exchange("output", None, lambda _: [file.new_name(), secrets.token_hex(_TOKEN)])
    file.take_name(name)
    if ranks.is_first:
        file.open(size)
        file.write(bytes.fromhex(expected), 0)
        file.sync()
    ranks.exchange("output created", None)
    if not ranks.is_first:
        file.join()
        if file.read(_TOKEN, 0).hex() != expected:
            raise OutputError(
                f"{file.target}: expected the file that rank 0 is writing, got another one on this rank. Write to "
                "storage that all ranks share."
            )
    ranks.exchange("output opened", None)
