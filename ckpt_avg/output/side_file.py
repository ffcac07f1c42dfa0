"""A side file: a file that is copied from a checkpoint to the output folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_avg.errors import ChangedWhileReadingError, fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import is_file
from ckpt_avg.limits import LIMITS

_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of an output folder that is not computed.

    Attributes:
        name: relative to the folder, with ``/``.
        path: the file that is copied.
        size: in bytes.
        sha256: of the contents, in hex.
        changed: the contents, if they are not those of the file.
    """

    name: str
    path: Path
    size: int
    sha256: str
    changed: bytes | None = None

    @classmethod
    def of(cls, name: str, path: Path) -> SideFile:
        """Reads the file once.

        Raises:
            CheckpointFormatError: it cannot be read, or is larger than any side file.
        """
        digest, size = hashlib.sha256(), 0
        for piece in _pieces(path):
            digest.update(piece)
            size += len(piece)
        return cls(name, path, size, digest.hexdigest())

    def with_contents(self, contents: bytes) -> SideFile:
        """Returns the same file with other contents."""
        return SideFile(self.name, self.path, len(contents), hashlib.sha256(contents).hexdigest(), contents)

    def pieces(self) -> Iterator[bytes]:
        """Yields the contents.

        Raises:
            CheckpointFormatError: the file cannot be read, or was changed since `of`.
        """
        if self.changed is not None:
            yield self.changed
            return
        digest, size = hashlib.sha256(), 0
        for piece in _pieces(self.path):
            digest.update(piece)
            size += len(piece)
            if size > self.size:
                break
            yield piece
        if digest.hexdigest() != self.sha256:
            raise ChangedWhileReadingError(f"{self.path}: was changed during the run. Run again.")


def _pieces(path: Path) -> Iterator[bytes]:
    with InputFile(path, reserve=0) as file:
        if file.size > LIMITS.side_file:
            fail(
                path, f"expected at most {LIMITS.side_file:,} bytes, got {file.size:,}", "Move it out of the checkpoint"
            )
        for offset in range(0, file.size, _PIECE):
            yield file.read(offset, min(_PIECE, file.size - offset))
        file.check_unchanged()


def text_in(path: Path) -> str:
    """Returns the text of a small file; an empty one of a large file."""
    with InputFile(path, reserve=0) as file:
        return file.read(0, file.size).decode(errors="replace") if file.size <= LIMITS.log else ""


def is_damaged_json(path: Path) -> bool:
    """Whether a file is no JSON; a large one is not looked at."""
    try:
        with InputFile(path, reserve=0) as file:
            if file.size <= LIMITS.log:
                json.loads(file.read(0, file.size))
    except (ValueError, RecursionError):
        return True
    return False


def json_of(path: Path) -> Any:
    """Returns the JSON in a file; an empty object if there is none."""
    try:
        return json.loads(text_in(path)) if is_file(path) else {}
    except (ValueError, RecursionError):
        return {}
