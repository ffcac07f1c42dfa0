"""Elements of stored tensors, in row-major order.

If their bytes are consecutive in the file, as they nearly always are, one read gets them. Strided tensors
(channels-last, transposed) and tensors that are stored in parts are gathered box by box, through windows of limited
size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ckpt_avg import engine
from ckpt_avg.checkpoint.spec import Checkpoint, DType, Part, TensorSpec, contiguous_stride
from ckpt_avg.files.input_file import InputFile

if TYPE_CHECKING:
    import torch

_WASTE = 4 * 1024  # bytes of a window that no range needs; as many as the ranges need are allowed, too
_SPAN = 4 * 1024 * 1024  # bytes of a window through which strided elements are gathered

# (tensor, first element, element after the last), counted in row-major order.
Range = tuple[TensorSpec, int, int]


class Ranges(list[Range]):
    """Ranges that are read together, one after the other; never changed. Checkpoints with equal headers share them."""

    @functools.cached_property
    def windows(self) -> list[_Window]:
        """The windows through which the contiguous ranges are read; ranges that are close to each other share one."""
        stored = sorted(
            (tensor.file, offset_of(tensor, start), offset_of(tensor, stop), index)
            for index, (tensor, start, stop) in enumerate(self)
            if start < stop and tensor.is_contiguous
        )
        windows: list[_Window] = []
        needed = 0  # bytes of the last window that its ranges need
        for file, first, last, index in stored:
            needed += last - first
            window = windows[-1] if windows else None
            if window and window.file == file and max(window.end, last) - window.begin <= 2 * needed + _WASTE:
                window.inside.append((first, index))
                window.is_filled = window.is_filled and first == window.end
                window.end = max(window.end, last)
            else:
                windows.append(_Window(file, first, last, [(first, index)]))
                needed = last - first
        return windows

    @functools.cached_property
    def gathered(self) -> list[int]:
        """The indices of those that are not contiguous."""
        return [index for index, (tensor, _, _) in enumerate(self) if not tensor.is_contiguous]


@dataclass(slots=True)
class _Window:
    """A part of a file that is read at once.

    Attributes:
        file: the file's index.
        begin, end: its first byte, and the byte after its last.
        inside: (first byte, index) of the ranges in it.
        is_filled: whether each range begins where the one before it ends.
    """

    file: int
    begin: int
    end: int
    inside: list[tuple[int, int]]
    is_filled: bool = True


def join_ranges(ranges: Iterable[Range]) -> Ranges:
    """Joins ranges, none of them empty, if they have one dtype and their bytes are consecutive in a file.

    A joined range is read as if it were one tensor, so that many small tensors cost no more than a large one.
    """
    groups: list[list[Range]] = []
    dtype: DType | None = None  # this, the file and the offset are those of what may be joined
    file = offset = 0
    for each in ranges:
        tensor, start, stop = each
        size = tensor.dtype.itemsize
        follows = tensor.offset + start * size == offset and tensor.file == file and tensor.dtype is dtype
        if follows and tensor.is_contiguous:
            groups[-1].append(each)
        else:
            groups.append([each])
            file, dtype = tensor.file, tensor.dtype if tensor.is_contiguous else None
        offset = tensor.offset + stop * size
    return Ranges(group[0] if len(group) == 1 else _joined(group) for group in groups)


def _joined(ranges: Sequence[Range]) -> Range:
    tensor, start, _ = ranges[0]
    numel = sum(stop - start for _, start, stop in ranges)
    return replace(tensor, shape=(numel,), stride=(1,), offset=offset_of(tensor, start)), 0, numel


def read_into(checkpoint: Checkpoint, ranges: Ranges, target: memoryview) -> None:
    """Fills ``target``, of bytes, with the elements of all ranges, one range after the other.

    Raises:
        ChangedWhileReadingError: the file was truncated meanwhile.
        CheckpointFormatError: the storage cannot be read.
    """
    targets: list[memoryview] = []
    filled = 0
    for tensor, start, stop in ranges:
        nbytes = (stop - start) * tensor.dtype.itemsize
        targets.append(target[filled : filled + nbytes])
        filled += nbytes
    for window in ranges.windows:
        file = checkpoint.files[window.file]
        if window.is_filled:
            file.read_into_each([targets[index] for _, index in window.inside], window.begin)
            continue
        contents = memoryview(file.read(window.begin, window.end - window.begin))
        for offset, index in window.inside:
            begin = offset - window.begin
            targets[index][:] = contents[begin : begin + len(targets[index])]
    for index in ranges.gathered:
        _gather(checkpoint, *ranges[index], targets[index])


def read_bytes(checkpoint: Checkpoint, ranges: Ranges) -> memoryview:
    """Returns the bytes that `read_into` fills a buffer with, and raises what it raises."""
    contents = memoryview(bytearray(sum((stop - start) * tensor.dtype.itemsize for tensor, start, stop in ranges)))
    read_into(checkpoint, ranges, contents)
    return contents


def offset_of(tensor: TensorSpec, element: int) -> int:
    """Returns the first byte of an element of a contiguous tensor."""
    return tensor.offset + element * tensor.dtype.itemsize


def read_ranges(checkpoint: Checkpoint, ranges: Sequence[Range]) -> list[torch.Tensor]:
    """Returns the elements of each range as a flat torch tensor. Raises what `read_into` raises."""
    import torch

    found: list[torch.Tensor] = []
    for tensor, start, stop in ranges:
        contents = read_bytes(checkpoint, Ranges([(tensor, start, stop)]))
        dtype = torch_dtype(tensor.dtype)
        found.append(torch.frombuffer(contents, dtype=dtype) if len(contents) else torch.empty(0, dtype=dtype))
    return found


def spans(checkpoint: Checkpoint, ranges: Ranges) -> list[tuple[InputFile, int, int]]:
    """Returns the file, the first byte and the byte after the last of what `read_into` reads of contiguous tensors."""
    return [(checkpoint.files[window.file], window.begin, window.end) for window in ranges.windows]


def stream_bytes(
    checkpoint: Checkpoint, tensor: TensorSpec, elements: int = 1024 * 1024
) -> Iterator[tuple[int, memoryview]]:
    """Yields (index of the first element, bytes of the elements) until the end of a tensor."""
    for start in range(0, tensor.numel, elements):
        yield start, read_bytes(checkpoint, Ranges([(tensor, start, min(tensor.numel, start + elements))]))


def stream(
    checkpoint: Checkpoint, tensor: TensorSpec, elements: int = 1024 * 1024
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields what `stream_bytes` does, as flat torch tensors."""
    import torch

    for start, contents in stream_bytes(checkpoint, tensor, elements):
        yield start, torch.frombuffer(contents, dtype=torch_dtype(tensor.dtype))


def torch_dtype(dtype: DType) -> torch.dtype:
    """Returns torch's dtype."""
    import torch

    named: torch.dtype = getattr(torch, dtype.torch_name)
    return named


# A box is a range of indices along each dimension: (first, end) pairs.
_Box = tuple[tuple[int, int], ...]


def _gather(checkpoint: Checkpoint, tensor: TensorSpec, start: int, stop: int, target: memoryview) -> None:
    position = 0  # in elements of the target
    for box in _boxes(tensor.shape, start, stop):
        extents = tuple(end - first for first, end in box)
        steps = contiguous_stride(extents)
        if not tensor.parts:
            _copy(checkpoint, tensor, box, target, position, steps)
        for part in tensor.parts:
            shared = _shared(box, part)
            if shared is not None:
                first = sum((a - begin) * step for (a, _), (begin, _), step in zip(shared, box, steps, strict=True))
                own = tuple((a - begin, b - begin) for (a, b), begin in zip(shared, part.starts, strict=True))
                _copy(checkpoint, part.tensor, own, target, position + first, steps)
        position += prod(extents)


def _copy(
    checkpoint: Checkpoint, tensor: TensorSpec, box: _Box, target: memoryview, position: int, steps: tuple[int, ...]
) -> None:
    """Copies a box of a tensor that is not stored in parts to an element of ``target``, with steps of its own."""
    for part in _split(tensor, box):
        begin, end = _span(tensor, part)
        window = checkpoint.files[tensor.file].read(begin, end - begin)
        first = sum((a - start) * step for (a, _), (start, _), step in zip(part, box, steps, strict=True))
        extents = tuple(b - a for a, b in part)
        _copy_strided(window, tensor.stride, target, position + first, steps, extents, tensor.dtype.itemsize)


def _copy_strided(
    source: bytes,
    from_steps: tuple[int, ...],
    target: memoryview,
    start: int,
    to_steps: tuple[int, ...],
    extents: tuple[int, ...],
    itemsize: int,
) -> None:
    kernel = engine.kernel()
    if kernel is not None:
        kernel.copy(source, 0, target, start * itemsize, extents, from_steps, to_steps, itemsize)
        return
    import torch

    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
    elements = torch.frombuffer(bytearray(source), dtype=dtype)  # a copy, because torch warns about bytes
    into = torch.frombuffer(target, dtype=dtype)
    into.as_strided(extents, to_steps, start).copy_(elements.as_strided(extents, from_steps))


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
