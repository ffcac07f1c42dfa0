"""Streams the mean: worker threads read blocks from every checkpoint, average them and write them.

Each element is computed alone, so the bytes do not depend on blocks, threads, the engine or the device. Working memory
has a fixed size: a worker has, of each checkpoint, only the bytes of its block or of a window of it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_into, spans
from ckpt_avg.engine import engine_for
from ckpt_avg.files import platform
from ckpt_avg.files.read_ahead import ReadAhead
from ckpt_avg.machine import gc_paused, run_workers
from ckpt_avg.mean.block_sizes import sizes_for
from ckpt_avg.mean.blocks import Block, cut_into_blocks
from ckpt_avg.mean.native import NativeEngine
from ckpt_avg.mean.plan import Plan

Write = Callable[[memoryview, int], None]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean to compute.

    Attributes:
        checkpoints: the indices of its checkpoints, in the order of the sum. Copied tensors are the highest one's.
        write: receives bytes and their offset in the data section; called from several threads.
        weights: of the checkpoints, finite and not zero; their sum is one. None if all count the same. Elements are
            Σ weight · value in float64: each product is rounded, then added.

    Raises:
        ValueError: there is not one such weight for each checkpoint.
    """

    checkpoints: Sequence[int]
    write: Write
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is not None and not (len(weights) == len(self.checkpoints) and all(map(_can_weigh, weights))):
            raise ValueError(f"weights that are not finite, or zero, or not one for each checkpoint: {weights}")


def _can_weigh(weight: float) -> bool:
    return math.isfinite(weight) and weight != 0


class Engine(Protocol):
    """What reads and averages blocks; each worker has its own."""

    def fit(self, block: Block, indices: Sequence[int]) -> list[Block]:
        """Returns the block, or smaller ones to compute instead."""

    def read(self, block: Block, indices: Sequence[int]) -> None:
        """Gets the elements of a block in the checkpoints of these indices."""

    def average(
        self, block: Block, indices: Sequence[int], weights: Sequence[float] | None, output: memoryview
    ) -> None:
        """Writes the mean of checkpoints for which `read` was called."""


def write_means(
    checkpoints: Sequence[Checkpoint],
    plan: Plan,
    means: Sequence[Mean],
    *,
    device: str,
    threads: int,
    memory: int,
    readers: int = 0,
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
        readers: threads that read ahead of the workers.
        allow_nonfinite: accept NaN and Inf in the inputs.
        within: the bytes of the data section to compute; all by default.
        progress: called with the number of input bytes just read; from several threads, but never at the same time.

    Raises:
        NonFiniteError: an input contains NaN or Inf, or the mean overflows the output dtype.
        ChangedWhileReadingError: an input was truncated or overwritten meanwhile.
    """
    within = range(plan.nbytes) if within is None else within
    is_native = engine_for(device) == "native"
    window, elements = sizes_for(
        device,
        is_native=is_native,
        memory=memory,
        threads=threads,
        plan=plan,
        within=within,
        checkpoints=len(checkpoints),
    )
    device = _in_any_thread(device)
    lock = threading.Lock()

    def work(blocks: Iterator[list[Block]]) -> None:
        if is_native:
            shared = len(means) > 1
            engine: Engine = NativeEngine(checkpoints, window, shared=shared, allow_nonfinite=allow_nonfinite)
        else:
            from ckpt_avg.mean.torch_engine import TorchEngine

            engine = TorchEngine(device, window, checkpoints, allow_nonfinite=allow_nonfinite)
        worker = _Worker(checkpoints, means, engine, elements, ahead)
        following = worker.prepare(next(blocks, []))
        while following:
            current, following = following, worker.prepare(next(blocks, []))
            nbytes = worker.compute(current)
            with lock:
                progress(nbytes)

    with gc_paused(), ReadAhead(readers) as ahead, contextlib.nullcontext() if is_native else _threads_of_torch_kept():
        run_workers(threads, cut_into_blocks(plan, elements, within), work)
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()


def _in_any_thread(device: str) -> str:
    """Returns the device that ``cuda`` means in this thread; in a new one it would be the first."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{torch.cuda.current_device()}"


@contextlib.contextmanager
def _threads_of_torch_kept() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Worker:
    """Reads, averages and writes blocks. Each thread has its own."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        means: Sequence[Mean],
        engine: Engine,
        elements: int,
        ahead: ReadAhead,
    ) -> None:
        self._checkpoints, self._means, self._engine, self._ahead = checkpoints, means, engine, ahead
        self._averaged = {index for mean in means for index in mean.checkpoints}
        self._output = memoryview(platform.memory(elements * 8, is_filled=True))

    def prepare(self, blocks: list[Block]) -> list[Block]:
        """Lets blocks be read ahead; returns them, or smaller ones to compute instead."""
        prepared: list[Block] = []
        for block in blocks:
            indices = self._inputs(block)
            for part in self._engine.fit(block, indices):
                inputs = (self._checkpoints[index] for index in indices)
                self._ahead.ask(spans(checkpoint, part.stored_in(checkpoint)) for checkpoint in inputs)
                prepared.append(part)
        return prepared

    def compute(self, blocks: Sequence[Block]) -> int:
        """Computes consecutive blocks for every mean and writes them; returns the input bytes.

        Copied elements count as read from every checkpoint, so that progress reaches the size of the inputs.
        """
        filled = 0
        for block in blocks:
            is_copied = block.source_dtype.kind == "exact"
            if not is_copied:
                self._engine.read(block, self._inputs(block))
            output = self._output[filled : filled + block.nbytes]
            for mean in self._means:
                chosen = self._chosen(block, mean)
                if is_copied:
                    checkpoint = self._checkpoints[chosen[-1]]
                    read_into(checkpoint, block.stored_in(checkpoint), output)
                else:
                    weights = mean.weights if block.rule == "mean" else None
                    self._engine.average(block, chosen, weights, output)
                if len(self._means) > 1:
                    mean.write(output, block.offset)
            filled += block.nbytes
        if len(self._means) == 1:
            self._means[0].write(self._output[:filled], blocks[0].offset)
        return len(self._averaged) * sum(block.numel * block.source_dtype.itemsize for block in blocks)

    def _inputs(self, block: Block) -> list[int]:
        """Returns the indices of the checkpoints that a block is read from."""
        return sorted({index for mean in self._means for index in self._chosen(block, mean)})

    def _chosen(self, block: Block, mean: Mean) -> Sequence[int]:
        """Returns the indices of the checkpoints that a block of a mean is computed from; one if it is copied."""
        if block.rule == "newest":
            return [len(self._checkpoints) - 1]
        return mean.checkpoints if block.rule == "mean" else [max(mean.checkpoints)]
