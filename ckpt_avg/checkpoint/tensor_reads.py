"""Elements of stored tensors, in row-major order, as flat torch tensors.

If their bytes are consecutive in the file, as they nearly always are, the result is a view of a window of the file and
nothing is copied. Strided tensors (channels-last, transposed) and tensors that are stored in parts are gathered box by
box, through windows of limited size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch

from ckpt_avg.checkpoint.spec import Checkpoint, DType, Part, TensorSpec
from ckpt_avg.files.input_file import FileMapping

_WASTE = 4 * 1024  # bytes of a window that no range needs; as many as the ranges need are allowed, too
_SPAN = 4 * 1024 * 1024  # bytes of a window through which strided elements are gathered

# (tensor, first element, element after the last), counted in row-major order.
Range = tuple[TensorSpec, int, int]


def join_ranges(ranges: Sequence[Range]) -> list[Range]:
    """Joins ranges, none of them empty, if they have one dtype and their bytes are consecutive in a file.

    A joined range is read as if it were one tensor, so that many small tensors cost no more than a large one.
    """
    groups: list[list[Range]] = []
    following: tuple[int, int, DType] | None = None  # the file, offset and dtype of what may be joined
    for tensor, start, stop in ranges:
        if tensor.is_contiguous and (tensor.file, _offset(tensor, start), tensor.dtype) == following:
            groups[-1].append((tensor, start, stop))
        else:
            groups.append([(tensor, start, stop)])
        following = (tensor.file, _offset(tensor, stop), tensor.dtype) if tensor.is_contiguous else None
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _joined(ranges: Sequence[Range]) -> Range:
    tensor, start, _ = ranges[0]
    numel = sum(stop - start for _, start, stop in ranges)
    return replace(tensor, shape=(numel,), stride=(1,), offset=_offset(tensor, start)), 0, numel


def read_ranges(checkpoint: Checkpoint, ranges: Sequence[Range]) -> list[torch.Tensor]:
    """Returns the elements of each range: flat, in the dtype of the tensor, read-only.

    Raises:
        ChangedWhileReadingError: the file was truncated meanwhile.
        CheckpointFormatError: the storage cannot be read.
    """
    found: dict[int, torch.Tensor] = {}
    for file, begin, end, inside in _windows(ranges):
        window = checkpoint.files[file].map(begin, end - begin)
        for offset, index in inside:
            tensor, start, stop = ranges[index]
            found[index] = _view(window, tensor, offset, stop - start)
    return [
        found[index] if index in found else _gather(checkpoint, tensor, start, stop)
        for index, (tensor, start, stop) in enumerate(ranges)
    ]


def prefetch(checkpoint: Checkpoint, ranges: Sequence[Range]) -> None:
    """Asks the system to read ahead what `read_ranges` will need."""
    for file, begin, end, _ in _windows(ranges):
        checkpoint.files[file].prefetch(begin, end - begin)


def stream(
    checkpoint: Checkpoint, tensor: TensorSpec, elements: int = 1024 * 1024
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first element, elements) until the end of a tensor."""
    for start in range(0, tensor.numel, elements):
        yield start, read_ranges(checkpoint, [(tensor, start, min(tensor.numel, start + elements))])[0]


def torch_dtype(dtype: DType) -> torch.dtype:
    """Returns torch's dtype."""
    named: torch.dtype = getattr(torch, dtype.torch_name)
    return named


def _offset(tensor: TensorSpec, element: int) -> int:
    """Returns the first byte of an element of a contiguous tensor."""
    return tensor.offset + element * tensor.dtype.itemsize


def _windows(ranges: Sequence[Range]) -> list[tuple[int, int, int, list[tuple[int, int]]]]:
    """Returns the windows through which the contiguous ranges are read; ranges that are close to each other share one.

    A window is (file, first byte, byte after the last, [(first byte, index), … of the ranges in it]).
    """
    stored = sorted(
        (tensor.file, _offset(tensor, start), _offset(tensor, stop), index)
        for index, (tensor, start, stop) in enumerate(ranges)
        if start < stop and tensor.is_contiguous
    )
    windows: list[tuple[int, int, int, list[tuple[int, int]]]] = []
    needed = 0  # bytes of the last window that its ranges need
    for file, first, last, index in stored:
        needed += last - first
        if windows and windows[-1][0] == file:
            _, begin, end, inside = windows[-1]
            end = max(end, last)
            if end - begin <= 2 * needed + _WASTE:
                inside.append((first, index))
                windows[-1] = (file, begin, end, inside)
                continue
        windows.append((file, first, last, [(first, index)]))
        needed = last - first
    return windows


def _view(mapping: FileMapping, tensor: TensorSpec, offset: int, count: int) -> torch.Tensor:
    itemsize = tensor.dtype.itemsize
    position = mapping.position + offset - mapping.offset
    if position % itemsize:
        unaligned = torch.frombuffer(mapping.buffer, dtype=torch.uint8, count=count * itemsize, offset=position)
        return unaligned.clone().view(torch_dtype(tensor.dtype))
    return torch.frombuffer(mapping.buffer, dtype=torch_dtype(tensor.dtype), count=count, offset=position)


# A box is a range of indices along each dimension: (first, end) pairs.
_Box = tuple[tuple[int, int], ...]


def _gather(checkpoint: Checkpoint, tensor: TensorSpec, start: int, stop: int) -> torch.Tensor:
    gathered = torch.empty(stop - start, dtype=torch_dtype(tensor.dtype))
    position = 0
    for box in _boxes(tensor.shape, start, stop):
        extents = [end - first for first, end in box]
        target = gathered[position : position + prod(extents)].view(extents)
        if not tensor.parts:
            _copy(checkpoint, tensor, box, target)
        for part in tensor.parts:
            shared = _shared(box, part)
            if shared is not None:
                within = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(shared, box, strict=True))
                own = tuple((a - begin, b - begin) for (a, b), begin in zip(shared, part.starts, strict=True))
                _copy(checkpoint, part.tensor, own, target[within])
        position += prod(extents)
    return gathered


def _copy(checkpoint: Checkpoint, tensor: TensorSpec, box: _Box, target: torch.Tensor) -> None:
    """Copies a box of a tensor that is not stored in parts."""
    file = checkpoint.files[tensor.file]
    for part in _split(tensor, box):
        begin, end = _span(tensor, part)
        count = (end - begin) // tensor.dtype.itemsize
        storage = _view(file.map(begin, end - begin), tensor, begin, count)
        inside = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(part, box, strict=True))
        target[inside] = torch.as_strided(storage, [b - a for a, b in part], tensor.stride)


def _shared(box: _Box, part: Part) -> _Box | None:
    """Returns the box that a box and a part of the tensor have in common, in indices of the complete tensor."""
    shared = tuple(
        (max(first, begin), min(end, begin + extent))
        for (first, end), begin, extent in zip(box, part.starts, part.tensor.shape, strict=True)
    )
    return shared if all(first < end for first, end in shared) else None


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[_Box]:
    """Cuts the row-major range [start, stop) of a shape into boxes, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    if first == last:
        yield from (((first, first + 1), *box) for box in _boxes(shape[1:], begin, end))
        return
    if begin:
        yield from (((first, first + 1), *box) for box in _boxes(shape[1:], begin, row))
        first += 1
    if first < last:
        yield ((first, last), *((0, extent) for extent in shape[1:]))
    if end:
        yield from (((last, last + 1), *box) for box in _boxes(shape[1:], 0, end))


def _split(tensor: TensorSpec, box: _Box) -> Iterator[_Box]:
    """Halves a box, along the dimension that spans the most bytes of the file, until each half fits in a window."""
    begin, end = _span(tensor, box)
    spans = [(last - first - 1) * step for (first, last), step in zip(box, tensor.stride, strict=True)]
    if end - begin <= _SPAN or max(spans) == 0:
        yield box
        return
    longest = spans.index(max(spans))
    first, last = box[longest]
    middle = (first + last) // 2
    for part in ((first, middle), (middle, last)):
        yield from _split(tensor, (*box[:longest], part, *box[longest + 1 :]))


def _span(tensor: TensorSpec, box: _Box) -> tuple[int, int]:
    """Returns the first byte of a box and the byte after the last."""
    first = sum(begin * step for (begin, _), step in zip(box, tensor.stride, strict=True))
    last = sum((end - 1) * step for (_, end), step in zip(box, tensor.stride, strict=True))
    itemsize = tensor.dtype.itemsize
    return tensor.offset + first * itemsize, tensor.offset + (last + 1) * itemsize
