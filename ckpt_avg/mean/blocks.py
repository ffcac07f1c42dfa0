"""`Block`: consecutive elements of the output that are computed together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

from ckpt_avg.checkpoint.spec import Checkpoint, TensorSpec
from ckpt_avg.checkpoint.tensor_reads import Ranges, join_ranges
from ckpt_avg.mean.buffers import Rule
from ckpt_avg.mean.plan import OutputTensor, Plan

_MOST_TENSORS = 4096  # to compute at a time

OutputRange = tuple[OutputTensor, int, int]  # tensor, first element, element after the last


class Block:
    """Consecutive elements of the output, all of one source dtype, one output dtype and one rule.

    A block is a slice of a large tensor, or several small tensors.

    Attributes:
        source_dtype, dtype: of the inputs, and of the output.
        rule: ``mean``, ``last`` or ``newest``, as `BufferKind.rule`; ``equal`` elements are copied like ``last``.
        ranges: (tensor, first element, element after the last) of each tensor in the block.
        offset: of the first byte in the output's data section.
        numel, nbytes: elements, and their bytes in the output.
    """

    def __init__(self, ranges: Sequence[OutputRange]) -> None:
        tensor, start, _ = ranges[0]
        self.source_dtype, self.dtype = tensor.source_dtype, tensor.dtype
        self.rule: Rule = "last" if tensor.rule == "equal" else tensor.rule
        self.offset = tensor.offset + start * self.dtype.itemsize
        self.numel = sum(stop - start for _, start, stop in ranges)
        self.nbytes = self.numel * self.dtype.itemsize
        self.ranges = ranges
        # Checkpoints with equal headers share one table of tensors, by which this is known.
        self._stored: dict[int, tuple[Mapping[str, TensorSpec], Ranges]] = {}

    def stored_in(self, checkpoint: Checkpoint) -> Ranges:
        """Returns where a checkpoint stores the elements: one range if they are consecutive there, too."""
        tensors = checkpoint.spec.tensors
        if id(tensors) not in self._stored:
            ranges = [(tensors[tensor.name], start, stop) for tensor, start, stop in self.ranges]
            self._stored[id(tensors)] = tensors, join_ranges(ranges)
        return self._stored[id(tensors)][1]

    def split(self, elements: int, checkpoints: Sequence[Checkpoint]) -> list[Block]:
        """Returns smaller blocks of at most ``elements`` elements, which each checkpoint stores in one dtype.

        Only tensors with more elements are cut.
        """
        groups: list[list[OutputRange]] = []
        room = 0
        for tensor, start, stop in self.ranges:
            for begin in range(start, stop, elements):
                end = min(stop, begin + elements)
                if end - begin > room:
                    groups.append([])
                    room = elements
                groups[-1].append((tensor, begin, end))
                room -= end - begin
        blocks = map(Block, groups)
        return [each for block in blocks for each in ([block] if block._is_uniform(checkpoints) else block.tensors())]

    def _is_uniform(self, checkpoints: Sequence[Checkpoint]) -> bool:
        stored = map(self.stored_in, checkpoints)
        return all(len({tensor.dtype for tensor, _, _ in ranges}) == 1 for ranges in stored)

    def parts(self, start: int, stop: int) -> Iterator[tuple[OutputTensor, int, int]]:
        """Yields each tensor that elements start … stop of the block belong to, and which of these elements do."""
        begin = 0
        for tensor, first, last in self.ranges:
            end = begin + last - first
            if max(begin, start) < min(end, stop):
                yield tensor, max(begin, start) - start, min(end, stop) - start
            begin = end

    def tensors(self) -> list[Block]:
        """Returns a block for each tensor."""
        return [Block([each]) for each in self.ranges]

    def locate(self, index: int) -> tuple[OutputTensor, int]:
        """Returns the tensor that an element of the block belongs to, and its index in that tensor."""
        for tensor, start, stop in self.ranges:
            if index < stop - start:
                return tensor, start + index
            index -= stop - start
        raise IndexError(index)


def cut_into_blocks(plan: Plan, elements: int, within: range | None = None) -> Iterator[list[Block]]:
    """Yields the blocks of the output in order, in lists of at most ``elements`` elements to compute at a time.

    Args:
        plan: the tensors of the output.
        elements: of all blocks of a list. It has several blocks if tensors of different dtypes follow each other.
        within: the bytes of the data section to cover; all by default. Both ends are ends of elements.
    """
    within = range(plan.nbytes) if within is None else within
    is_part = within != range(plan.nbytes)
    blocks: list[Block] = []
    room, left = elements, _MOST_TENSORS
    for _, alike in itertools.groupby(plan.tensors, key=attrgetter("source_dtype", "dtype", "rule")):
        ranges: list[OutputRange] = []
        for tensor in alike:
            start, end = 0, tensor.numel
            if is_part:
                start = max(0, within.start - tensor.offset) // tensor.dtype.itemsize
                end = min(end, max(0, within.stop - tensor.offset) // tensor.dtype.itemsize)
            while start < end:
                stop = min(end, start + room)
                ranges.append((tensor, start, stop))
                room -= stop - start
                left -= 1
                start = stop
                if room == 0 or left == 0:
                    yield [*blocks, Block(ranges)]
                    blocks, ranges, room, left = [], [], elements, _MOST_TENSORS
        if ranges:
            blocks.append(Block(ranges))
    if blocks:
        yield blocks
