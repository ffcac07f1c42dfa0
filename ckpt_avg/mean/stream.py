"""Streams the mean: worker threads read blocks from every checkpoint, average them and write them.

Each element is computed alone, so the bytes do not depend on blocks, threads, the engine or the device. Working memory
has a fixed size: a worker has, of each checkpoint, only the bytes of its block or of a window of it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_into, spans, torch_dtype
from ckpt_avg.engine import engine_for
from ckpt_avg.machine import gc_paused, run_workers
from ckpt_avg.mean.blocks import Block, cut_into_blocks
from ckpt_avg.mean.native import NativeEngine
from ckpt_avg.mean.plan import Plan
from ckpt_avg.mean.read_ahead import ReadAhead

if TYPE_CHECKING:
    import torch

LEAST_CHUNK = 1024  # elements
# Elements that torch sums at a time: few enough that the float64 sum and the widened input, 2 MiB together, stay in the
# cache of a core, and enough to outweigh the calls.
_CHUNK = 128 * 1024
_MOST_ELEMENTS = 8 * 1024 * 1024  # larger blocks are no faster
_MOST_CUDA_ELEMENTS = 1024 * 1024  # of a block, which is one chunk: enough to outweigh the launches of its kernels
_SUMS, _FLOAT64_SUMS = 70, 150  # bytes on CUDA for each element: what the sum, the rounding and the checks need at most
_CUDA_MEMORY = 32 * 1024 * 1024  # bytes of a worker
_LEAST_BLOCKS = 2  # for each worker, so that all finish at about the same time
_MOST_OUTPUT = 4 * 1024 * 1024  # bytes of a block of the native engine: enough to outweigh what Python does for each
_MOST_INPUT = 256 * 1024 * 1024  # bytes of a block in all checkpoints: a call is not interrupted
_WINDOWS = 4 * 1024 * 1024  # bytes of all its windows together, so that memory does not grow with the checkpoints …
_LEAST_WINDOW = 64 * 1024  # … unless they would get smaller than this

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
    sizes = _native_sizes if is_native else _torch_sizes if device == "cpu" else _cuda_sizes
    window, elements = sizes(memory, threads, plan, within, len(checkpoints), device)
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


def most_workers(device: str, memory: int) -> int | None:
    """Returns how many workers are worth starting; None if there may be one for each core.

    On CUDA each operation of torch holds the interpreter lock for some microseconds, whatever the size of the block. If
    a worker has less than `_CUDA_MEMORY`, workers wait for the lock longer than for the copies; and torch reserves 22
    MiB of the device for each stream.
    """
    return None if device == "cpu" else max(1, memory // _CUDA_MEMORY)


def write_tensors(tensors: Mapping[str, torch.Tensor], plan: Plan, write: Write) -> None:
    """Writes small tensors over those in an output."""
    import torch

    planned = plan.by_name()
    for name, value in tensors.items():
        write(memoryview(bytes(value.reshape(-1).view(torch.uint8).tolist())), planned[name].offset)


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


def _native_sizes(
    memory: int, threads: int, plan: Plan, within: range, checkpoints: int, device: str
) -> tuple[int, int]:
    """Returns the bytes of a window and the elements of a block such that the workers together use ``memory`` bytes.

    A worker has a window of each checkpoint, and the output of its block, in memory.
    """
    each = memory // threads
    output = min(_MOST_OUTPUT, each // 4)
    window = min(max(_WINDOWS // checkpoints, _LEAST_WINDOW), (each - output) // checkpoints)
    itemsize = max((tensor.dtype.itemsize for tensor in plan.tensors), default=1)
    most = min(output, _MOST_INPUT // checkpoints) // itemsize
    elements = min(most, _share(plan, within, threads, most // 16))
    return max(mmap.PAGESIZE, window - window % mmap.PAGESIZE), max(LEAST_CHUNK, elements)


def _torch_sizes(
    memory: int, threads: int, plan: Plan, within: range, checkpoints: int, device: str
) -> tuple[int, int]:
    """Returns the elements of a chunk and of a block such that the workers together use ``memory`` bytes.

    For each element of its block, a worker has the bytes of every checkpoint and of the output in memory; for each
    element of a chunk a sum and a widened input (32 bytes, since a complex element has two parts). With more
    checkpoints, blocks are smaller.
    """
    each = memory // threads
    chunk = max(LEAST_CHUNK, min(_CHUNK, each // 64))
    # Bytes of an element in all inputs that are read, and in the output; of a copied element one input is read.
    kinds = {(tensor.source_dtype, tensor.dtype, tensor.rule == "mean") for tensor in plan.tensors}
    nbytes = max((checkpoints if is_mean else 1) * source.itemsize + dtype.itemsize for source, dtype, is_mean in kinds)
    share = _share(plan, within, threads, chunk)
    elements = max(LEAST_CHUNK, min(_MOST_ELEMENTS, share, (each - 32 * chunk) // nbytes))
    return min(chunk, elements), elements


def _cuda_sizes(memory: int, threads: int, plan: Plan, within: range, checkpoints: int, device: str) -> tuple[int, int]:
    """Returns the elements of a chunk, which is a whole block, twice.

    The workers together use ``memory`` bytes of the host, and as many of the device. For each element of its block, a
    worker has on the device every input that is read, and room for the sum; on the host the output, and page-locked
    memory for two inputs and an output, which torch rounds up to powers of two.
    """
    kinds = {(tensor.source_dtype, tensor.dtype, tensor.rule == "mean") for tensor in plan.tensors}
    nbytes = max(
        max(
            (checkpoints if is_mean else 1) * source.itemsize
            + (_FLOAT64_SUMS if source.torch_name == "float64" else _SUMS),
            4 * source.itemsize + 3 * dtype.itemsize,
        )
        for source, dtype, is_mean in kinds
    )
    share = _share(plan, within, threads, _CHUNK)
    elements = max(LEAST_CHUNK, min(_MOST_CUDA_ELEMENTS, share, memory // threads // nbytes))
    return elements, elements


def _share(plan: Plan, within: range, threads: int, least: int) -> int:
    """Returns how many elements a block may have if each worker is to get several, but at least ``least``."""
    here = sum(tensor.numel for tensor in plan.tensors) * len(within) // max(1, plan.nbytes)
    return max(least, here // (_LEAST_BLOCKS * threads))


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
        self._output = memoryview(mmap.mmap(-1, elements * 8))

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
        import torch

        return {
            tensor.name: torch.frombuffer(
                self._buffer, dtype=torch_dtype(tensor.dtype), count=tensor.numel, offset=tensor.offset
            ).view(tensor.shape)
            if tensor.numel
            else torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            for tensor in self._plan.tensors
        }
