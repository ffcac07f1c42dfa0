"""Which checkpoints have the same weights, byte for byte.

Two checkpoints of a run differ nearly everywhere, so a few bytes of each tensor show that they differ. Only if all of
these are equal are the weights read in full.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

from ckpt_avg.checkpoint.spec import Checkpoint, TensorSpec

_SAMPLES = 64  # tensors of which _BYTES are compared first
_BYTES = 64
_BLOCK = 4 * 1024 * 1024


def find_copies(checkpoints: Sequence[Checkpoint], *, in_full: bool = True) -> dict[int, int]:
    """Returns, for the index of each copy of an earlier checkpoint, the index of that one.

    Args:
        checkpoints: open checkpoints.
        in_full: compare all bytes if the samples are equal; otherwise equal samples suffice.
    """
    alike: dict[tuple[bytes, bytes], list[int]] = {}
    copies: dict[int, int] = {}
    tables = {id(each.spec.tensors): each.spec.tensors for each in checkpoints}  # equal headers share a table
    described = {key: _described(table, is_only=len(tables) == 1) for key, table in tables.items()}
    for index, checkpoint in enumerate(checkpoints):
        description, tensors = described[id(checkpoint.spec.tensors)]
        others = alike.setdefault((description, _sample(checkpoint, tensors)), [])
        original = next((other for other in others if not in_full or _same(checkpoints[other], checkpoint)), None)
        if original is None:
            others.append(index)
        else:
            copies[index] = original
    return copies


def _stored(tensor: TensorSpec) -> Iterator[tuple[int, int, int]]:
    """Yields (file, first byte, number of bytes) of a tensor, including gaps between strided elements."""
    for piece in [part.tensor for part in tensor.parts] or [tensor]:
        if piece.numel:
            last = sum((extent - 1) * step for extent, step in zip(piece.shape, piece.stride, strict=True))
            yield piece.file, piece.offset, (last + 1) * piece.dtype.itemsize


def _described(table: Mapping[str, TensorSpec], *, is_only: bool) -> tuple[bytes, list[TensorSpec]]:
    """Returns a digest of what the tensors with elements are, and those of them that samples are taken of.

    If no checkpoint has another table, the digest is empty.
    """
    tensors = [tensor for tensor in table.values() if 0 not in tensor.shape]
    digest = b""
    if not is_only:
        tensors.sort(key=attrgetter("name"))
        description = repr([(t.name, t.dtype.name, t.shape) for t in tensors]).encode(errors="surrogatepass")
        digest = hashlib.sha256(description).digest()
    return digest, tensors[:: max(1, len(tensors) // _SAMPLES)]


def _sample(checkpoint: Checkpoint, tensors: Sequence[TensorSpec]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        file, begin, nbytes = next(_stored(tensor))
        middle = begin + nbytes // 2 // tensor.dtype.itemsize * tensor.dtype.itemsize
        digest.update(checkpoint.files[file].read(middle, min(_BYTES, begin + nbytes - middle)))
    return digest.digest()


def _same(first: Checkpoint, other: Checkpoint) -> bool:
    for name, tensor in first.spec.tensors.items():
        twin = other.spec.tensors.get(name)
        if twin is None or (twin.dtype, twin.shape, twin.stride) != (tensor.dtype, tensor.shape, tensor.stride):
            return False
        if [(part.starts, part.tensor.stride) for part in tensor.parts] != [
            (part.starts, part.tensor.stride) for part in twin.parts
        ]:
            return False
        for (file, begin, nbytes), (its_file, its_begin, _) in zip(_stored(tensor), _stored(twin), strict=True):
            for start in range(0, nbytes, _BLOCK):
                length = min(_BLOCK, nbytes - start)
                expected = first.files[file].read(begin + start, length)
                if expected != other.files[its_file].read(its_begin + start, length):
                    return False
    return len(first.spec.tensors) == len(other.spec.tensors)
