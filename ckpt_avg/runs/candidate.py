"""`Candidate`: one checkpoint that could be averaged, open, with what it records."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.wording import setting


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that could be averaged.

    Attributes:
        path: where it is.
        checkpoint: the open checkpoint; None if it could not be opened.
        error: why not.
        record: step, epoch and metrics.
    """

    path: Path
    checkpoint: Checkpoint | None
    error: CheckpointFormatError | None
    record: Record

    def opened(self) -> Checkpoint:
        """Returns the open checkpoint.

        Raises:
            CheckpointFormatError: it could not be opened.
        """
        if self.checkpoint is None:
            raise self.error or CheckpointFormatError(f"{self.path}: cannot be opened.")
        return self.checkpoint


def excluding(candidates: Iterable[Candidate]) -> str:
    """Returns the options that skip at most 20 candidates."""
    return setting("--exclude", *(each.path.name for each in itertools.islice(candidates, 20)))
