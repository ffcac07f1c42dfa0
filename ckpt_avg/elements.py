"""Ranges of a stored tensor's elements, in row-major order, as flat torch tensors.

Where the bytes lie side by side, which is nearly always, the result is a view of the map and nothing is copied.
Strided tensors (channels-last, transposed) are gathered box by box, so that even then no more than the range is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch

from ckpt_avg.mapped import MappedFile
from ckpt_avg.readers import Checkpoint
from ckpt_avg.spec import TensorSpec

_GAP = 256 * 1024  # bytes between two ranges that are faulted in as one


def flat_range(checkpoint: Checkpoint, tensor: TensorSpec, start: int, stop: int) -> torch.Tensor:
    """Returns the elements [start, stop) of a tensor, read-only, in its own dtype.

    The pages must have been faulted in (`populate`), or a truncated file would end the process.
    """
    file = checkpoint.files[tensor.file]
    if tensor.is_contiguous:
        return _run(file, tensor, tensor.offset + start * tensor.dtype.itemsize, stop - start)
    boxes = [_strided(file, tensor, box) for box in _boxes(tensor.shape, start, stop)]
    return boxes[0] if len(boxes) == 1 else torch.cat(boxes)


def stream(
    checkpoint: Checkpoint, tensor: TensorSpec, elements: int = 1024 * 1024
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first element, elements) over a whole tensor; a chunk is valid until the next."""
    file = checkpoint.files[tensor.file]
    for start in range(0, tensor.numel, elements):
        stop = min(tensor.numel, start + elements)
        begin, length = byte_range(tensor, start, stop)
        file.populate(begin, length)
        yield start, flat_range(checkpoint, tensor, start, stop)
        file.release(begin, length)


def byte_range(tensor: TensorSpec, start: int, stop: int) -> tuple[int, int]:
    """Returns (first byte, bytes) of the part of the file that holds the elements [start, stop)."""
    itemsize = tensor.dtype.itemsize
    if tensor.is_contiguous:
        return tensor.offset + start * itemsize, (stop - start) * itemsize
    firsts, ends = zip(*(_span(tensor, box) for box in _boxes(tensor.shape, start, stop)), strict=True)
    return min(firsts), max(ends) - min(firsts)


def coalesce(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins byte ranges (first byte, bytes) that lie next to each other, so that one system call serves them."""
    joined: list[tuple[int, int]] = []
    for first, length in sorted(ranges):
        if joined and first <= joined[-1][0] + joined[-1][1] + _GAP:
            begin = joined[-1][0]
            joined[-1] = (begin, max(joined[-1][1], first + length - begin))
        else:
            joined.append((first, length))
    return joined


def torch_dtype(tensor: TensorSpec) -> torch.dtype:
    """Returns the torch dtype of a stored tensor."""
    dtype: torch.dtype = getattr(torch, tensor.dtype.torch_name)
    return dtype


def _run(file: MappedFile, tensor: TensorSpec, offset: int, count: int) -> torch.Tensor:
    dtype = torch_dtype(tensor)
    if count == 0:
        return torch.empty(0, dtype=dtype)
    nbytes = count * tensor.dtype.itemsize
    buffer, position = file.buffer(offset, nbytes)
    if position % tensor.dtype.itemsize:
        return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=position).clone().view(dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=position)


# A box is a range of indices along each dimension: (first, end) pairs.
_Box = tuple[tuple[int, int], ...]


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[_Box]:
    """Cuts the row-major range [start, stop) of a shape into boxes, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start, stop),) if shape else ()
        return
    row = prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    whole = tuple((0, extent) for extent in shape[1:])
    if first == last:
        yield from (((first, first + 1), *box) for box in _boxes(shape[1:], begin, end))
        return
    if begin:
        yield from (((first, first + 1), *box) for box in _boxes(shape[1:], begin, row))
        first += 1
    if first < last:
        yield ((first, last), *whole)
    if end:
        yield from (((last, last + 1), *box) for box in _boxes(shape[1:], 0, end))


def _span(tensor: TensorSpec, box: _Box) -> tuple[int, int]:
    """Returns the first byte of a box and the byte after its last."""
    first = sum(begin * step for (begin, _), step in zip(box, tensor.stride, strict=True))
    last = sum((end - 1) * step for (_, end), step in zip(box, tensor.stride, strict=True))
    itemsize = tensor.dtype.itemsize
    return tensor.offset + first * itemsize, tensor.offset + (last + 1) * itemsize


def _strided(file: MappedFile, tensor: TensorSpec, box: _Box) -> torch.Tensor:
    first, end = _span(tensor, box)
    storage = _run(file, tensor, first, (end - first) // tensor.dtype.itemsize)
    extents = [stop - start for start, stop in box]
    return torch.as_strided(storage, extents, tensor.stride).reshape(-1)
