"""`MemoryFile`: tensors that a pickle holds itself, behind the interface of `InputFile`."""

from __future__ import annotations

from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import IO, FileMapping


class MemoryFile:
    """Bytes in memory, read like a file.

    Args:
        path: the file that they came from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents = bytearray()
        self._places: dict[int, tuple[int, bytes | bytearray]] = {}

    @property
    def size(self) -> int:
        """Bytes held."""
        return len(self._contents)

    def add(self, contents: bytes | bytearray) -> int:
        """Appends bytes, aligned for any dtype, and returns where they begin; the same object is held once."""
        if id(contents) not in self._places:
            self._contents += bytes(-len(self._contents) % 16)
            self._places[id(contents)] = (len(self._contents), contents)
            self._contents += contents
        return self._places[id(contents)][0]

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointFormatError(f"{self.path}: expected {length:,} bytes at byte {offset:,} of what it holds.")
        return bytes(memoryview(self._contents)[offset : offset + length])

    def map(self, offset: int, length: int) -> FileMapping:
        """Returns a range without copying it."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointFormatError(f"{self.path}: expected {length:,} bytes at byte {offset:,} of what it holds.")
        return FileMapping(self._contents, offset, offset)

    def use_io(self, io: IO) -> None:
        """Does nothing: the bytes are in memory."""

    def prefetch(self, offset: int, length: int) -> None:
        """Does nothing: the bytes are in memory."""

    def check_unchanged(self) -> None:
        """Does nothing: nobody else can change these bytes."""

    def close(self) -> None:
        """Does nothing: the bytes go with the object."""
