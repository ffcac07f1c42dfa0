"""How far checkpoints are from their mean and from each other: sums of products, in one pass over their tensors.

The differences d_i = x_i − m of checkpoints from their mean are small against their norms. So the products are those
of the differences and of the mean, ⟨d_i, d_j⟩, ⟨d_i, m⟩ and ⟨m, m⟩, in float64, not those of the checkpoints: all
distances follow from them without cancellation (`geometry`).

Blocks depend on the number of checkpoints alone, and their sums are added in their order, so the results don't depend
on threads. torch's matrix product computes them: it is N + 1 times the arithmetic of a mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_into, spans, torch_dtype
from ckpt_avg.machine import gc_paused, run_workers
from ckpt_avg.mean.arithmetic import as_real
from ckpt_avg.mean.blocks import Block, cut_into_blocks
from ckpt_avg.mean.plan import OutputTensor, Plan
from ckpt_avg.mean.read_ahead import ReadAhead

_READ = 1024 * 1024  # elements of all checkpoints that a worker reads at a time
_CHUNK = 128 * 1024  # elements of all rows that it multiplies at a time: float64 numbers that stay in a core's cache
_LEAST = 256  # elements of one checkpoint, for very many checkpoints


@dataclass(frozen=True, slots=True)
class TensorSums:
    """The sums of one tensor: squares of the rows d_1, …, d_N, m, and their products with m."""

    squares: torch.Tensor
    with_mean: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """What one pass measures of N checkpoints. All numbers are float64.

    Attributes:
        products: for each group of tensors the (N + 1, N + 1) products of d_1, …, d_N and the mean m.
        tensors: by name.
        nonfinite: by the index of a checkpoint, its tensors with NaN or Inf and how many elements these are. The mean
            is that of the finite values of an element; the sums of these checkpoints have no meaning.
    """

    products: Mapping[str, torch.Tensor]
    tensors: dict[str, TensorSums] = field(default_factory=dict)
    nonfinite: dict[int, dict[str, int]] = field(default_factory=dict)


def measure(
    checkpoints: Sequence[Checkpoint],
    plan: Plan,
    groups: Mapping[str, str],
    *,
    threads: int,
    readers: int,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Sums:
    """Reads each tensor of the plan once from every checkpoint and returns the sums.

    Args:
        checkpoints: open checkpoints that fit together.
        plan: the tensors, of floating-point dtypes alone.
        groups: the group of each tensor, by name.
        threads: workers.
        readers: threads that read ahead of the workers.
        progress: called with the number of input bytes just read; from several threads, but never at the same time.

    Raises:
        ChangedWhileReadingError: an input was truncated or overwritten meanwhile.
    """
    number = len(checkpoints)
    sums = _InOrder(number, groups)
    lock = threading.Lock()
    blocks = cut_into_blocks(plan, max(_LEAST, _READ // number))
    kept = torch.get_num_threads()

    def work(items: Iterator[tuple[int, list[Block]]]) -> None:
        worker = _Worker(checkpoints, ahead)
        following = worker.prepare(next(items, None))
        while following is not None:
            (index, current), following = following, worker.prepare(next(items, None))
            parts = [part for block in current for part in worker.products(block)]
            nbytes = number * sum(block.numel * block.source_dtype.itemsize for block in current)
            with lock:
                sums.add(index, parts)
                progress(nbytes)

    try:
        with gc_paused(), ReadAhead(readers) as ahead:
            run_workers(threads, enumerate(blocks), work)
    finally:
        torch.set_num_threads(kept)
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()
    return sums.total


@dataclass(frozen=True, slots=True)
class _Part:
    """The products of consecutive elements of a tensor, and how many of them are not finite in which checkpoint."""

    tensor: OutputTensor
    products: torch.Tensor
    nonfinite: Mapping[int, int]


class _InOrder:
    """Adds the sums of blocks in the order of the blocks, whichever is ready first."""

    def __init__(self, number: int, groups: Mapping[str, str]) -> None:
        shape = number + 1, number + 1
        names = sorted(set(groups.values()))
        self.total = Sums({name: torch.zeros(shape, dtype=torch.float64) for name in names})
        self._groups = groups
        self._waiting: dict[int, Sequence[_Part]] = {}
        self._next = 0

    def add(self, index: int, parts: Sequence[_Part]) -> None:
        """Adds the sums of block ``index`` when those of all blocks before it have been added."""
        self._waiting[index] = parts
        while self._next in self._waiting:
            for part in self._waiting.pop(self._next):
                self._add(part)
            self._next += 1

    def _add(self, part: _Part) -> None:
        name = part.tensor.name
        self.total.products[self._groups[name]].add_(part.products)
        squares, with_mean = part.products.diagonal(), part.products[:, -1]
        if known := self.total.tensors.get(name):
            known.squares.add_(squares)
            known.with_mean.add_(with_mean)
        else:
            self.total.tensors[name] = TensorSums(squares.clone(), with_mean.clone())
        for index, count in part.nonfinite.items():
            found = self.total.nonfinite.setdefault(index, {})
            found[name] = found.get(name, 0) + count


class _Worker:
    """Reads blocks from every checkpoint and multiplies them. Each thread has its own, and one thread of torch."""

    def __init__(self, checkpoints: Sequence[Checkpoint], ahead: ReadAhead) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        self._checkpoints, self._ahead = checkpoints, ahead
        self._chunk = max(_LEAST, _CHUNK // (len(checkpoints) + 1))
        self._rows = torch.empty((len(checkpoints) + 1) * self._chunk, dtype=torch.float64)
        self._single = torch.empty(self._chunk, dtype=torch.float32)

    def prepare(self, item: tuple[int, list[Block]] | None) -> tuple[int, list[Block]] | None:
        """Lets the blocks of an item be read ahead."""
        for block in item[1] if item else ():
            self._ahead.ask(spans(checkpoint, block.stored_in(checkpoint)) for checkpoint in self._checkpoints)
        return item

    def products(self, block: Block) -> Iterator[_Part]:
        """Yields the products of each tensor in a block, chunk by chunk."""
        # In one checkpoint neighbouring tensors may have different dtypes.
        for uniform in block.split(block.numel, self._checkpoints):
            values = [self._read(uniform, checkpoint) for checkpoint in self._checkpoints]
            width = 2 if block.source_dtype.kind == "complex" else 1
            step = self._chunk // width
            for start in range(0, uniform.numel, step):
                stop = min(uniform.numel, start + step)
                rows = self._rows[: (len(values) + 1) * (stop - start) * width].view(len(values) + 1, -1)
                bad = self._subtract_mean(rows, [each[start * width : stop * width] for each in values])
                for tensor, begin, end in uniform.parts(start, stop):
                    part = rows[:, begin * width : end * width]
                    found = {} if bad is None else _count(bad[:, begin * width : end * width], width)
                    yield _Part(tensor, part @ part.T, found)

    def _read(self, block: Block, checkpoint: Checkpoint) -> torch.Tensor:
        ranges = block.stored_in(checkpoint)
        dtype = ranges[0][0].dtype
        contents = bytearray(block.numel * dtype.itemsize)
        read_into(checkpoint, ranges, memoryview(contents))
        return as_real(torch.frombuffer(contents, dtype=torch_dtype(dtype)))

    def _subtract_mean(self, rows: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Fills the rows with the differences from the mean, and the mean; returns where values are not finite."""
        differences, mean = rows[:-1], rows[-1]
        for row, narrow in zip(differences, values, strict=True):
            is_half = narrow.dtype == torch.float16  # widened by processors in two steps, and slowly by torch in one
            row.copy_(self._single[: len(row)].copy_(narrow) if is_half else narrow)
        torch.mean(differences, 0, out=mean)
        bad = None
        if not mean.sum().isfinite():
            bad = differences.isfinite().logical_not_()
            bad &= differences.ne(differences[0]).any(0)  # the same in every checkpoint, as in a mask: no difference
            differences.masked_fill_(differences.isfinite().logical_not_(), 0.0)
            torch.div(differences.sum(0), bad.logical_not().sum(0).clamp_(min=1), out=mean)
        differences.sub_(mean)
        return bad


def _count(bad: torch.Tensor, width: int) -> dict[int, int]:
    """Returns how many elements, of ``width`` values each, are bad, by row; no row that has none."""
    counts = bad.view(bad.shape[0], -1, width).any(2).sum(1).tolist()
    return {index: count for index, count in enumerate(counts) if count}
