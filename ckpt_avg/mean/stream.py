"""Streams the mean: worker threads read blocks from every checkpoint, average them and write them.

Each element is computed alone, so the bytes do not depend on blocks, threads or the device. Working memory has a fixed
size: a worker maps, of each checkpoint, only the bytes of its block.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import prefetch, read_ranges, torch_dtype
from ckpt_avg.machine import gc_paused, run_workers
from ckpt_avg.mean.averager import LEAST_CHUNK, Averager
from ckpt_avg.mean.blocks import Block, cut_into_blocks
from ckpt_avg.mean.plan import Plan

# Elements summed at a time: few enough that the float64 sum and the widened input, 2 MiB together, stay in the cache of
# a core, and enough to outweigh the calls.
_CHUNK = 128 * 1024
_CUDA_CHUNK = 1024 * 1024  # enough to outweigh the launch of a kernel
_MOST_ELEMENTS = 8 * 1024 * 1024  # larger blocks are no faster
_LEAST_BLOCKS = 2  # for each worker, so that all finish at about the same time

Write = Callable[[memoryview, int], None]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean to compute.

    Attributes:
        checkpoints: the indices of its checkpoints, in the order of the sum. Copied tensors are the highest one's.
        write: receives bytes and their offset in the data section; called from several threads.
    """

    checkpoints: Sequence[int]
    write: Write


def write_means(
    checkpoints: Sequence[Checkpoint],
    plan: Plan,
    means: Sequence[Mean],
    *,
    device: torch.device,
    threads: int,
    memory: int,
    allow_nonfinite: bool = False,
    within: range | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Computes every tensor of the plan for each mean and writes its bytes. The inputs are read once for all means.

    Args:
        checkpoints: open checkpoints that fit together, in the order in which they are summed, up to the plan's last.
        plan: the tensors of the output.
        means: which checkpoints to average, and where to write.
        device: where sums are computed.
        threads: workers.
        memory: bytes of working memory, shared by the workers.
        allow_nonfinite: accept NaN and Inf in the inputs.
        within: the bytes of the data section to compute; all by default.
        progress: called with the number of input bytes just read; from several threads, but never at the same time.

    Raises:
        NonFiniteError: an input contains NaN or Inf, or the mean overflows the output dtype.
        ChangedWhileReadingError: an input was truncated or overwritten meanwhile.
    """
    within = range(plan.nbytes) if within is None else within
    chunk, elements = _sizes(memory, threads, plan, within, len(checkpoints), device)
    lock = threading.Lock()

    def work(blocks: Iterator[list[Block]]) -> None:
        torch.set_num_threads(1)  # of this thread alone; the workers are the parallelism
        averager = Averager(device, chunk, checkpoints, allow_nonfinite=allow_nonfinite)
        worker = _Worker(checkpoints, means, averager, chunk, elements)
        following = worker.prepare(next(blocks, []))
        while following:
            current, following = following, worker.prepare(next(blocks, []))
            nbytes = worker.compute(current)
            with lock:
                progress(nbytes)

    before = torch.get_num_threads()
    try:
        with gc_paused():
            run_workers(threads, cut_into_blocks(plan, elements, within), work)
    finally:
        torch.set_num_threads(before)
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()


def write_tensors(tensors: Mapping[str, torch.Tensor], plan: Plan, write: Write) -> None:
    """Writes small tensors over those in an output."""
    planned = plan.by_name()
    for name, value in tensors.items():
        write(memoryview(bytes(value.reshape(-1).view(torch.uint8).tolist())), planned[name].offset)


def _sizes(
    memory: int, threads: int, plan: Plan, within: range, checkpoints: int, device: torch.device
) -> tuple[int, int]:
    """Returns the elements of a chunk and of a block such that the workers together use ``memory`` bytes.

    For each element of its block, a worker has the bytes of every checkpoint and of the output in memory; for each
    element of a chunk a sum and a widened input (32 bytes, since a complex element has two parts). With more
    checkpoints, blocks are smaller.
    """
    each = memory // threads
    chunk = max(LEAST_CHUNK, min(_CHUNK if device.type == "cpu" else _CUDA_CHUNK, each // 64))
    # Bytes of an element in all inputs that are read, and in the output; of a copied element one input is read.
    kinds = {(tensor.source_dtype, tensor.dtype, tensor.rule == "mean") for tensor in plan.tensors}
    nbytes = max((checkpoints if is_mean else 1) * source.itemsize + dtype.itemsize for source, dtype, is_mean in kinds)
    here = sum(tensor.numel for tensor in plan.tensors) * len(within) // max(1, plan.nbytes)
    share = max(chunk, here // (_LEAST_BLOCKS * threads))
    elements = max(LEAST_CHUNK, min(_MOST_ELEMENTS, share, (each - 32 * chunk) // nbytes))
    return min(chunk, elements), elements


class _Worker:
    """Reads, averages and writes blocks. Each thread has its own."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], means: Sequence[Mean], averager: Averager, chunk: int, elements: int
    ) -> None:
        self._checkpoints, self._means, self._averager, self._chunk = checkpoints, means, averager, chunk
        self._averaged = {index for mean in means for index in mean.checkpoints}
        self._buffer = mmap.mmap(-1, elements * 8)
        self._output = torch.frombuffer(self._buffer, dtype=torch.uint8)

    def prepare(self, blocks: list[Block]) -> list[Block]:
        """Asks the system to read blocks ahead; returns them, or smaller ones to compute instead.

        If an input does not store the elements of a block consecutively, they are copied together. Such a block has at
        most the elements of a chunk, unless it is a part of one tensor.
        """
        prepared: list[Block] = []
        for block in blocks:
            inputs = self._inputs(block).values()
            is_consecutive = all(len(block.stored_in(checkpoint)) == 1 for checkpoint in inputs)
            parts = [block] if is_consecutive else block.split(self._chunk)
            for part in parts:
                for checkpoint in inputs:
                    prefetch(checkpoint, part.stored_in(checkpoint))
            prepared += parts
        return prepared

    def compute(self, blocks: Sequence[Block]) -> int:
        """Computes consecutive blocks for every mean and writes them; returns the input bytes.

        Copied elements count as read from every checkpoint, so that progress reaches the size of the inputs.
        """
        inputs = [self._read(block) for block in blocks]
        for mean in self._means:
            filled = 0
            for block, values in zip(blocks, inputs, strict=True):
                output = self._output[filled : filled + block.nbytes].view(torch_dtype(block.dtype))
                chosen = [values[index] for index in self._chosen(block, mean)]
                if block.source_dtype.kind == "exact":
                    output.copy_(chosen[-1])
                else:
                    self._averager.average(block, chosen, output)
                filled += block.nbytes
            mean.write(memoryview(self._buffer)[:filled], blocks[0].offset)
        return len(self._averaged) * sum(block.numel * block.source_dtype.itemsize for block in blocks)

    def _read(self, block: Block) -> dict[int, torch.Tensor]:
        """Returns the elements of a block in each checkpoint, by the checkpoint's index."""
        values: dict[int, torch.Tensor] = {}
        for index, checkpoint in self._inputs(block).items():
            parts = read_ranges(checkpoint, block.stored_in(checkpoint))
            wide = [part.to(torch_dtype(block.source_dtype)) for part in parts]
            values[index] = wide[0] if len(wide) == 1 else torch.cat(wide)
        return values

    def _inputs(self, block: Block) -> dict[int, Checkpoint]:
        """Returns the checkpoints that a block is read from, by index."""
        return {index: self._checkpoints[index] for mean in self._means for index in self._chosen(block, mean)}

    def _chosen(self, block: Block, mean: Mean) -> Sequence[int]:
        """Returns the indices of the checkpoints that a block of a mean is computed from; one if it is copied."""
        if block.rule == "newest":
            return [len(self._checkpoints) - 1]
        return mean.checkpoints if block.rule == "mean" else [max(mean.checkpoints)]


class MemoryOutput:
    """The data section of an output in memory. Several threads may write to it at the same time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._buffer = mmap.mmap(-1, max(1, plan.nbytes))

    def write(self, contents: memoryview, offset: int) -> None:
        """Writes bytes at an offset in the data section."""
        self._buffer[offset : offset + len(contents)] = contents

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by name: views of this memory."""
        return {
            tensor.name: torch.frombuffer(
                self._buffer, dtype=torch_dtype(tensor.dtype), count=tensor.numel, offset=tensor.offset
            ).view(tensor.shape)
            if tensor.numel
            else torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            for tensor in self._plan.tensors
        }
