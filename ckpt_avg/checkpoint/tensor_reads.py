"""Ranges of stored tensors' elements, in row-major order, as flat torch tensors.

Where the bytes lie side by side, which is nearly always, the result is a view of a mapped window and nothing is copied.
Strided tensors (channels-last, transposed) and tensors that are stored in parts are gathered box by box through
windows of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ckpt_avg.checkpoint.spec import Checkpoint, DType, Part, TensorSpec
from ckpt_avg.files.input_file import Window

_WASTE = 4 * 1024  # bytes that a window may hold, beyond as many again as are asked for, to serve neighbours too
_SPAN = 4 * 1024 * 1024  # bytes of a window through which strided elements are gathered

Range = tuple[TensorSpec, int, int]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Ranges of one dtype, to be read one after the other.

    Attributes:
        ranges: (tensor, first element, element after the last), none of them empty.
        together: where they lie side by side in one file, a tensor of them, the first byte and the byte after the
            last; else None.
    """

    ranges: tuple[Range, ...]
    together: tuple[TensorSpec, int, int] | None

    @staticmethod
    def of(ranges: Sequence[Range]) -> Stretch:
        """Returns the stretch of these ranges."""
        return Stretch(tuple(ranges), _side_by_side(ranges))


def read_ranges(checkpoint: Checkpoint, ranges: Sequence[Range]) -> list[torch.Tensor]:
    """Returns the elements of each range, flat, in the tensor's own dtype. They must not be written to.

    Args:
        checkpoint: an open checkpoint.
        ranges: (tensor, first element, element after the last), counted in row-major order. Neighbours in the file
            share one window.

    Raises:
        ChangedWhileReadingError: the file was truncated meanwhile.
        CheckpointFormatError: the storage cannot be read.
    """
    found: dict[int, torch.Tensor] = {}
    for index, (tensor, start, stop) in enumerate(ranges):
        if start == stop:
            found[index] = torch.empty(0, dtype=torch_dtype(tensor.dtype))
        elif not tensor.is_contiguous:
            found[index] = _gather(checkpoint, tensor, start, stop)
    for file, begin, end, members in _coalesce(_contiguous(ranges)):
        window = checkpoint.files[file].window(begin, end - begin)
        for offset, index in members:
            tensor, start, stop = ranges[index]
            found[index] = _view(window, tensor, offset, stop - start)
    return [found[index] for index in range(len(ranges))]


def read_stretch(checkpoint: Checkpoint, stretch: Stretch) -> torch.Tensor:
    """Returns the elements of a stretch as one flat tensor.

    Where they lie side by side in the file, as in most files of one layout, it is a view of one window, so that many
    small tensors cost no more than a large one.

    Raises:
        ChangedWhileReadingError, CheckpointFormatError: as `read_ranges`.
    """
    if stretch.together is not None:
        tensor, begin, end = stretch.together
        window = checkpoint.files[tensor.file].window(begin, end - begin)
        return _view(window, tensor, begin, (end - begin) // tensor.dtype.itemsize)
    parts = read_ranges(checkpoint, stretch.ranges)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def prefetch(checkpoint: Checkpoint, stretch: Stretch) -> None:
    """Asks the system to bring in what `read_stretch` will want."""
    if stretch.together is not None:
        tensor, begin, end = stretch.together
        checkpoint.files[tensor.file].prefetch(begin, end - begin)
        return
    for file, begin, end, _ in _coalesce(_contiguous(stretch.ranges)):
        checkpoint.files[file].prefetch(begin, end - begin)


def stream(
    checkpoint: Checkpoint, tensor: TensorSpec, elements: int = 1024 * 1024
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first element, elements) over a whole tensor."""
    for start in range(0, tensor.numel, elements):
        yield start, read_ranges(checkpoint, [(tensor, start, min(tensor.numel, start + elements))])[0]


def torch_dtype(dtype: DType) -> torch.dtype:
    """Returns torch's name for a dtype."""
    named: torch.dtype = getattr(torch, dtype.torch_name)
    return named


def _side_by_side(ranges: Sequence[Range]) -> tuple[TensorSpec, int, int] | None:
    first, end = ranges[0][0], -1
    begin = first.offset + ranges[0][1] * first.dtype.itemsize
    for tensor, start, stop in ranges:
        offset = tensor.offset + start * tensor.dtype.itemsize
        if end not in (-1, offset) or tensor.file != first.file or start == stop or not tensor.is_contiguous:
            return None
        end = offset + (stop - start) * tensor.dtype.itemsize
    return first, begin, end


def _contiguous(ranges: Sequence[Range]) -> list[tuple[int, int, int, int]]:
    """Returns (file, first byte, bytes, index) of each range, not empty, whose bytes lie side by side."""
    return [
        (tensor.file, tensor.offset + start * tensor.dtype.itemsize, (stop - start) * tensor.dtype.itemsize, index)
        for index, (tensor, start, stop) in enumerate(ranges)
        if start < stop and tensor.is_contiguous
    ]


def _coalesce(ranges: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, list[tuple[int, int]]]]:
    """Joins (file, first byte, bytes, index) that lie close: (file, first byte, end, [(first byte, index), …])."""
    joined: list[tuple[int, int, int, list[tuple[int, int]]]] = []
    useful = 0
    for file, first, length, index in sorted(ranges):
        if joined and joined[-1][0] == file:
            _, begin, end, members = joined[-1]
            end = max(end, first + length)
            if end - begin <= 2 * (useful + length) + _WASTE:
                members.append((first, index))
                joined[-1] = (file, begin, end, members)
                useful += length
                continue
        joined.append((file, first, first + length, [(first, index)]))
        useful = length
    return joined


def _view(window: Window, tensor: TensorSpec, offset: int, count: int) -> torch.Tensor:
    itemsize = tensor.dtype.itemsize
    position = window.position + offset - window.offset
    if position % itemsize:
        unaligned = torch.frombuffer(window.buffer, dtype=torch.uint8, count=count * itemsize, offset=position)
        return unaligned.clone().view(torch_dtype(tensor.dtype))
    return torch.frombuffer(window.buffer, dtype=torch_dtype(tensor.dtype), count=count, offset=position)


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
    """Copies a box of a tensor that is stored as one."""
    file = checkpoint.files[tensor.file]
    for part in _split(tensor, box):
        begin, end = _span(tensor, part)
        count = (end - begin) // tensor.dtype.itemsize
        storage = _view(file.window(begin, end - begin), tensor, begin, count)
        inside = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(part, box, strict=True))
        target[inside] = torch.as_strided(storage, [b - a for a, b in part], tensor.stride)


def _shared(box: _Box, part: Part) -> _Box | None:
    """Returns what a box shares with a part of the tensor, in indices of the whole."""
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
    """Halves a box along its longest way through the file until its bytes span no more than a window."""
    begin, end = _span(tensor, box)
    ways = [(last - first - 1) * step for (first, last), step in zip(box, tensor.stride, strict=True)]
    if end - begin <= _SPAN or max(ways) == 0:
        yield box
        return
    longest = ways.index(max(ways))
    first, last = box[longest]
    middle = (first + last) // 2
    for part in ((first, middle), (middle, last)):
        yield from _split(tensor, (*box[:longest], part, *box[longest + 1 :]))


def _span(tensor: TensorSpec, box: _Box) -> tuple[int, int]:
    """Returns the first byte of a box and the byte after its last."""
    first = sum(begin * step for (begin, _), step in zip(box, tensor.stride, strict=True))
    last = sum((end - 1) * step for (_, end), step in zip(box, tensor.stride, strict=True))
    itemsize = tensor.dtype.itemsize
    return tensor.offset + first * itemsize, tensor.offset + (last + 1) * itemsize
