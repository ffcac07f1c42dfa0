"""`Checkpoint`: what is held open while a checkpoint is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from ckpt_avg.checkpoint.spec import CheckpointSpec
from ckpt_avg.files.in_memory import MemoryFile
from ckpt_avg.files.input_file import MappedFile


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: what it holds, and the files that hold it. Use it as a context manager."""

    spec: CheckpointSpec
    files: Sequence[MappedFile | MemoryFile]

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if a file was truncated or modified since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
