"""How far checkpoints are from their mean and from each other: sums of products, in one pass over their tensors.

The differences d_i = x_i − m of checkpoints from their mean are small against their norms. So the products are those
of the differences and of the mean, ⟨d_i, d_j⟩, ⟨d_i, m⟩ and ⟨m, m⟩, in float64, not those of the checkpoints: all
distances follow from them without cancellation (`geometry`).

Blocks depend on the number of checkpoints alone, and their sums are added in their order, so the results don't depend
on threads. All products are kept for groups of tensors alone: memory does not grow with N² times the tensors. torch's
matrix product computes them: it is N + 1 times the arithmetic of a mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_into, spans, torch_dtype
from ckpt_avg.files.read_ahead import ReadAhead
from ckpt_avg.machine import SharedItems, gc_paused, run_workers
from ckpt_avg.mean.arithmetic import as_real
from ckpt_avg.mean.blocks import Block, cut_into_blocks
from ckpt_avg.mean.plan import Plan

_READ = 1024 * 1024  # elements of all checkpoints that a worker reads at a time
_CHUNK = 128 * 1024  # elements of all rows that it multiplies at a time: float64 numbers that stay in a core's cache
_LEAST = 256  # elements of one checkpoint, for very many checkpoints
_LOOK = 0.1  # seconds after which a worker that waits looks whether another has failed


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

    products: dict[str, torch.Tensor] = field(default_factory=dict)
    tensors: dict[str, TensorSums] = field(default_factory=dict)
    nonfinite: dict[int, dict[str, int]] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Adds what was measured of other elements of the same checkpoints."""
        for group, products in other.products.items():
            if group in self.products:
                self.products[group].add_(products)
            else:
                self.products[group] = products.clone()
        for name, tensor in other.tensors.items():
            if known := self.tensors.get(name):
                known.squares.add_(tensor.squares)
                known.with_mean.add_(tensor.with_mean)
            else:
                self.tensors[name] = TensorSums(tensor.squares.clone(), tensor.with_mean.clone())
        for index, counts in other.nonfinite.items():
            found = self.nonfinite.setdefault(index, {})
            for name, count in counts.items():
                found[name] = found.get(name, 0) + count


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
    shape = number + 1, number + 1
    total = Sums({group: torch.zeros(shape, dtype=torch.float64) for group in sorted(set(groups.values()))})
    in_order = _InOrder(total, 2 * threads)  # each worker has one block in hand, and has taken the next
    lock = threading.Lock()
    blocks = cut_into_blocks(plan, max(_LEAST, _READ // number))
    kept = torch.get_num_threads()

    def work(items: SharedItems[tuple[int, list[Block]]]) -> None:
        worker = _Worker(checkpoints, groups, ahead)
        following = worker.prepare(next(items, None))
        while following is not None:
            (index, current), following = following, worker.prepare(next(items, None))
            found = worker.measure(current)
            nbytes = number * sum(block.numel * block.source_dtype.itemsize for block in current)
            with lock:
                progress(nbytes)
            in_order.add(index, found, items.check)

    try:
        with gc_paused(), ReadAhead(readers) as ahead:
            run_workers(threads, enumerate(blocks), work)
    finally:
        torch.set_num_threads(kept)
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()
    return total


class _InOrder:
    """Adds the sums of blocks in the order of the blocks, whichever is ready first; at most ``most`` of them wait."""

    def __init__(self, total: Sums, most: int) -> None:
        self._total, self._most = total, most
        self._waiting: dict[int, Sums] = {}
        self._next = 0
        self._changed = threading.Condition()

    def add(self, index: int, sums: Sums, check: Callable[[], None]) -> None:
        """Adds the sums of block ``index`` when those of all blocks before it have been added.

        If too many wait it returns later. Meanwhile it calls ``check`` now and then.
        """
        with self._changed:
            while not self._changed.wait_for(lambda: index <= self._next + self._most, _LOOK):
                check()
            self._waiting[index] = sums
            while self._next in self._waiting:
                self._total.add(self._waiting.pop(self._next))
                self._next += 1
            self._changed.notify_all()


class _Worker:
    """Reads blocks from every checkpoint and multiplies them. Each thread has its own, and one thread of torch."""

    def __init__(self, checkpoints: Sequence[Checkpoint], groups: Mapping[str, str], ahead: ReadAhead) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        self._checkpoints, self._groups, self._ahead = checkpoints, groups, ahead
        self._chunk = max(_LEAST, _CHUNK // (len(checkpoints) + 1))
        self._rows = torch.empty((len(checkpoints) + 1) * self._chunk, dtype=torch.float64)
        # One for all tensors: between the small results, memory of many would not be used again.
        self._products = torch.empty(len(checkpoints) + 1, len(checkpoints) + 1, dtype=torch.float64)
        self._single = torch.empty(self._chunk, dtype=torch.float32)

    def prepare(self, item: tuple[int, list[Block]] | None) -> tuple[int, list[Block]] | None:
        """Lets the blocks of an item be read ahead."""
        for block in item[1] if item else ():
            self._ahead.ask(spans(checkpoint, block.stored_in(checkpoint)) for checkpoint in self._checkpoints)
        return item

    def measure(self, blocks: Sequence[Block]) -> Sums:
        """Returns the sums of blocks. Of a tensor they keep 2 (N + 1) numbers: all its products would be N²."""
        total = Sums()
        for block in blocks:
            for sums in self._parts(block):
                total.add(sums)
        return total

    def _parts(self, block: Block) -> Iterator[Sums]:
        """Yields the sums of each tensor in a block, chunk by chunk: views of memory that the next ones overwrite."""
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
                    products = torch.mm(part, part.T, out=self._products)
                    yield Sums(
                        {self._groups[tensor.name]: products},
                        {tensor.name: TensorSums(products.diagonal(), products[:, -1])},
                        {index: {tensor.name: count} for index, count in found.items()},
                    )

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
