"""A tensor of a pickle → where its elements lie, checked against the storage that holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ckpt_avg.checkpoint.spec import TensorSpec
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.pickles.leaves import StoredTensor
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote

Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FileContents:
    """What a torch file holds.

    Attributes:
        objects: what its pickle describes.
        place_of: storage key → where that storage lies: (first byte, bytes); None where there is none.
        digest: SHA-256 of the pickle, in hex.
    """

    objects: object
    place_of: Callable[[str], Place | None]
    digest: str


def place(path: Path, name: str, tensor: StoredTensor, record: Place | None) -> TensorSpec:
    """Returns where a tensor's elements lie.

    Args:
        path: what to name in errors.
        name: the tensor's name.
        tensor: the view of a storage, as the pickle gives it.
        record: where the storage lies: (first byte, bytes) in file 0; None if the archive holds none.

    Raises:
        CheckpointFormatError: the record is missing or has another size, or the view is not inside it.
    """
    where = f"{path}: tensor {quote(name)}"
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    if record is None:
        raise CheckpointFormatError(
            f"{where}: expected the record {quote(storage.key)}, got none. Copy the file again."
        )
    begin, length = record
    expected = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
    if length != expected:
        raise CheckpointFormatError(
            f"{where}: expected a record of {quote(expected)} bytes, got {length:,}. Copy or save the file again."
        )
    shape, stride, offset = tensor.shape, tensor.stride, tensor.offset
    numbers = (*shape, *stride, offset)
    if len(shape) != len(stride) or len(shape) > LIMITS.rank or min(numbers) < 0 or max(numbers) > LIMITS.elements:
        raise CheckpointFormatError(
            f"{where}: expected sizes and strides from 0 to 2⁶³−1, got shape {quote(shape)}, stride {quote(stride)}, "
            f"offset {quote(offset)}. Save it again."
        )
    spec = TensorSpec(name, tensor.dtype, shape, stride, 0, begin + offset * itemsize, (begin, length))
    if prod(max(extent, 1) for extent in shape) * itemsize > LIMITS.elements:
        raise CheckpointFormatError(f"{where}: shape {quote(shape)} overflows 63 bits. Save it again.")
    if 0 in shape:
        return spec
    last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if (last + 1) * itemsize > length:
        raise CheckpointFormatError(
            f"{where}: expected its elements inside a record of {length:,} bytes, got a view that ends at byte "
            f"{(last + 1) * itemsize:,}. Save it again."
        )
    if spec.nbytes > max(length, LIMITS.expanded):
        raise CheckpointFormatError(
            f"{where}: expected a tensor no larger than its record of {length:,} bytes, got an expanded view of "
            f"{spec.nbytes:,} bytes. Save tensor.contiguous() instead."
        )
    return spec
