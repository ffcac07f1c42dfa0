"""What stands in a state dict at a tensor's place, before it is known where its elements lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ckpt_avg.checkpoint.spec import DType
from ckpt_avg.errors import CheckpointFormatError


class Leaf:
    """A tensor of any kind."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A record of the archive. ``dtype`` is None for an untyped storage, whose ``numel`` counts bytes."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor(Leaf):
    """A view of a storage, not yet checked against its record."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnreadableTensor(Leaf):
    """A tensor of a kind that has no plain elements in one storage; ``kind`` says which."""

    kind: str


def refuse(what: str) -> NoReturn:
    """Raises the error that a hostile or broken pickle deserves; the caller adds the file."""
    raise CheckpointFormatError(f"{what}. Don't trust this file; save the weights again where they come from.")
