"""The unpublished output of several ranks: one file, which each of them fills in part."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from ckpt_avg.atomic import UnpublishedFile, atomic_output
from ckpt_avg.errors import OutputError
from ckpt_avg.ranks import Ranks

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
        token = secrets.token_bytes(_TOKEN)
        if ranks.is_first:
            file.open(size, named=True)
            file.write(token, 0)
            file.sync()
        name, expected = ranks.exchange("output", None, lambda _: [file.readable_path.name, token.hex()])
        if not ranks.is_first:
            file.join(name)
            if _first_bytes(file.readable_path).hex() != expected:
                raise OutputError(
                    f"{target}: expected the file that rank 0 is writing, got another one on this rank. Write to "
                    "storage that all ranks share."
                )
        ranks.exchange("output opened", None)
        yield file
    finally:
        file.close()


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_TOKEN)
