"""A range of a file that is read like a file of its own: one archive among others."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ckpt_avg.errors import CheckpointFormatError


class Readable(Protocol):
    """What a reader of headers needs of a file."""

    @property
    def path(self) -> Path:
        """What to name in errors."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``, or raises CheckpointFormatError."""


class Region:
    """The bytes [begin, begin + size) of a file.

    Raises:
        CheckpointFormatError: they are not all inside the file.
    """

    def __init__(self, file: Readable, begin: int, size: int) -> None:
        if begin < 0 or size < 0 or begin + size > file.size:
            raise CheckpointFormatError(
                f"{file.path}: expected {size:,} bytes at byte {begin:,}, got a file of {file.size:,} bytes. It is "
                "truncated or damaged: copy it again."
            )
        self._file, self.begin, self.size, self.path = file, begin, size, file.path

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointFormatError(f"{self.path}: expected {length:,} bytes at byte {self.begin + offset:,}.")
        return self._file.read(self.begin + offset, length)
