"""The streaming mean: float64 sums in checkpoint order, one true division, one correctly rounded cast.

Each element is computed alone, so the bytes do not depend on chunks, threads or the device. Working memory is bounded
by the budget that the caller gives: a worker holds, of each checkpoint, one window of pages, and gives it back when
the window is done.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from ckpt_avg.devices import Staging
from ckpt_avg.elements import Range, read_ranges, torch_dtype
from ckpt_avg.errors import NonFiniteError, UsageError
from ckpt_avg.nonfinite import describe_nonfinite, refuse_overflow
from ckpt_avg.plan import OutputTensor, Piece, Plan
from ckpt_avg.readers import Checkpoint
from ckpt_avg.rounding import round_to

# Elements summed at a time: float64 sum and widened input, 1 MiB together, stay in a core's second-level cache.
_CHUNK = 64 * 1024
_CUDA_CHUNK = 1024 * 1024  # there a chunk must outweigh the launch of a kernel
_WINDOW = 4 * 1024 * 1024  # a task of more elements gains nothing and shares the work out less evenly

DEFAULT_MEMORY = 128 * 2**20
_LEAST_MEMORY = 2**20

Write = Callable[[memoryview, int], None]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """How the working memory is divided.

    Attributes:
        threads: workers.
        chunk: elements summed at a time.
        window: elements of one task.
    """

    threads: int
    chunk: int
    window: int


def check_memory(memory: int) -> None:
    """Raises UsageError where there is too little to work with."""
    if memory < _LEAST_MEMORY:
        raise UsageError(f"--memory: expected {_LEAST_MEMORY:,} or more, got {memory:,}.")


def divide_memory(memory: int, *, threads: int, checkpoints: int, device: torch.device) -> Budget:
    """Divides ``memory`` bytes between the workers.

    Each holds, for every element of its window, up to 8 bytes of each checkpoint and of the output, and for every
    element of its chunk a sum and a widened input (32 bytes, since a complex element has two parts). The same budget
    therefore holds whatever the number of checkpoints: their windows get smaller.
    """
    each = memory // threads
    chunk = max(1024, min(_CHUNK if device.type == "cpu" else _CUDA_CHUNK, each // 64))
    window = max(1024, min(_WINDOW, (each - 32 * chunk) // (8 * (checkpoints + 1))))
    return Budget(threads, min(chunk, window), window)


@dataclass(frozen=True, slots=True)
class Target:
    """A mean to be computed of consecutive checkpoints, and where its bytes go.

    Attributes:
        checkpoints: which of them, as a range of their indices.
        write: takes bytes and their offset in the data section; called from several threads.
    """

    checkpoints: range
    write: Write


def write_mean(
    checkpoints: Sequence[Checkpoint],
    plan: Plan,
    write: Write,
    *,
    budget: Budget,
    device: torch.device,
    allow_nonfinite: bool = False,
    within: range | None = None,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Computes every tensor of the plan over all checkpoints and writes its bytes; `write_means` of one target."""
    write_means(
        checkpoints,
        plan,
        [Target(range(len(checkpoints)), write)],
        budget=budget,
        device=device,
        allow_nonfinite=allow_nonfinite,
        within=within,
        progress=progress,
    )


def write_means(
    checkpoints: Sequence[Checkpoint],
    plan: Plan,
    targets: Sequence[Target],
    *,
    budget: Budget,
    device: torch.device,
    allow_nonfinite: bool = False,
    within: range | None = None,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Computes every tensor of the plan for each target and writes its bytes. The inputs are read once for all targets.

    Args:
        checkpoints: open checkpoints that agree, in the order in which they are summed.
        plan: what to compute and where it goes.
        targets: of which checkpoints.
        budget: threads and working memory.
        device: where sums are kept.
        allow_nonfinite: let NaN and Inf of the inputs through.
        within: which bytes of the data section to compute; all if not given.
        progress: called with the input bytes that have just been read, from several threads, one at a time.

    Raises:
        NonFiniteError: an input holds NaN or Inf, or the mean overflows the output dtype.
        ChangedWhileReadingError: an input was truncated or overwritten meanwhile.
    """
    tasks = plan.tasks(budget.window, within)
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        torch.set_num_threads(1)  # the workers are the parallelism; in torch this is a setting of each thread
        worker = _Worker(checkpoints, targets, budget, device, allow_nonfinite)
        while not stop.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                return
            nbytes = worker.run(task)
            with lock:
                progress(nbytes)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(budget.threads, thread_name_prefix="mean") as pool:
            futures = [pool.submit(work) for _ in range(budget.threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
    finally:
        torch.set_num_threads(before)
    for future in futures:
        future.result()
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()


class _Worker:
    """What one thread needs to compute tasks: its buffers and its way to the device."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        targets: Sequence[Target],
        budget: Budget,
        device: torch.device,
        allow_nonfinite: bool,
    ) -> None:
        self._checkpoints = checkpoints
        self._targets = targets
        self._averaged = {index for target in targets for index in target.checkpoints}
        self._copied = {target.checkpoints[-1] for target in targets}
        self._chunk = budget.chunk
        self._allow_nonfinite = allow_nonfinite
        self._staging = Staging(device, budget.chunk * 8)
        self._buffer = mmap.mmap(-1, budget.window * 8)
        self._output = torch.frombuffer(self._buffer, dtype=torch.uint8)
        with self._staging.context():
            # A complex element is two real ones.
            self._sum = torch.empty(2 * budget.chunk, dtype=torch.float64, device=device)
            self._wide = torch.empty(2 * budget.chunk, dtype=torch.float64, device=device)
            self._counts = [
                torch.tensor(float(len(target.checkpoints)), dtype=torch.float64, device=device) for target in targets
            ]

    def run(self, task: tuple[Piece, ...]) -> int:
        """Computes one task for every target and writes it; returns the input bytes read."""
        inputs = [
            read_ranges(checkpoint, self._ranges(index, checkpoint, task))
            for index, checkpoint in enumerate(self._checkpoints)
        ]
        first = task[0].tensor.offset + task[0].start * task[0].tensor.dtype.itemsize
        for target, count in zip(self._targets, self._counts, strict=True):
            filled = 0
            with self._staging.context():
                for index, piece in enumerate(task):
                    nbytes = (piece.stop - piece.start) * piece.tensor.dtype.itemsize
                    output = self._output[filled : filled + nbytes].view(torch_dtype(piece.tensor.dtype))
                    self._fill(piece, [inputs[member][index] for member in target.checkpoints], count, output)
                    filled += nbytes
            target.write(memoryview(self._buffer)[:filled], first)
        of_each = sum((piece.stop - piece.start) * piece.tensor.source_dtype.itemsize for piece in task)
        return len(self._averaged) * of_each

    def _ranges(self, index: int, checkpoint: Checkpoint, task: tuple[Piece, ...]) -> list[Range]:
        """Returns what a task needs of a checkpoint: what is copied is read from each target's last one alone."""
        ranges = []
        for piece in task:
            needed = index in (self._averaged if piece.tensor.rule == "mean" else self._copied)
            ranges.append(
                (checkpoint.spec.tensors[piece.tensor.name], piece.start, piece.stop if needed else piece.start)
            )
        return ranges

    def _fill(self, piece: Piece, inputs: Sequence[torch.Tensor], count: torch.Tensor, output: torch.Tensor) -> None:
        if piece.tensor.rule != "mean":
            output.copy_(inputs[-1])
            return
        for start in range(0, output.numel(), self._chunk):
            stop = min(output.numel(), start + self._chunk)
            parts = [values[start:stop] for values in inputs]
            self._average(piece.tensor, piece.start + start, parts, count, output[start:stop])

    def _average(
        self,
        tensor: OutputTensor,
        start: int,
        inputs: Sequence[torch.Tensor],
        count: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        def chunk(index: int) -> torch.Tensor:
            return _as_real(self._staging.bring(inputs[index]))

        if tensor.source_dtype.torch_name == "float64":
            mean = _mean_of_float64(chunk, count)
        else:
            mean = self._mean_of_narrower(chunk, len(inputs), count)
        # One number tells of any NaN or Inf: it costs 1/N of looking at every input.
        if not self._allow_nonfinite and not math.isfinite(mean.sum().item()) and not mean.isfinite().all():
            raise NonFiniteError(describe_nonfinite(self._checkpoints, tensor))
        rounded = round_to(mean, _as_real(output).dtype)
        if tensor.dtype is not tensor.source_dtype and not self._allow_nonfinite:
            refuse_overflow(tensor, start, mean, rounded)
        _as_real(output).copy_(rounded)

    def _mean_of_narrower(self, chunk: Callable[[int], torch.Tensor], number: int, count: torch.Tensor) -> torch.Tensor:
        """Sums inputs below float64, which no number of finite ones can overflow, in the worker's buffers."""
        first = chunk(0)
        total, wide = self._sum[: first.numel()], self._wide[: first.numel()]
        total.copy_(first)
        for index in range(1, number):
            total.add_(wide.copy_(chunk(index)))
        # By a tensor on the device: CUDA multiplies by the reciprocal of a Python number.
        return total.div_(count)


def _mean_of_float64(chunk: Callable[[int], torch.Tensor], count: torch.Tensor) -> torch.Tensor:
    """Means of float64 inputs, where the sum itself rounds and can overflow.

    What each addition loses is kept and added at the end (TwoSum: Knuth, The Art of Computer Programming, vol. 2,
    section 4.2.2, theorem B). Elements that are equal in all checkpoints are taken as they are, and a sum that
    overflows is taken again of inputs scaled by a power of two.
    """
    first = chunk(0)
    number = int(count.item())
    total, lost = first.clone(), torch.zeros_like(first)
    equal = torch.ones_like(first, dtype=torch.bool)
    for index in range(1, number):
        other = chunk(index)
        equal &= other.view(torch.int64).eq(first.view(torch.int64))
        after = total + other
        kept = after - total
        lost += (total - (after - kept)) + (other - kept)
        total = after
    total += lost
    overflowed = total.isfinite().logical_not_()  # the sum, or a step on the way to what was lost
    mean = total.div(count)
    if overflowed.any():
        scale = 2.0 ** -math.ceil(math.log2(number))
        scaled = chunk(0) * scale
        for index in range(1, number):
            scaled.add_(chunk(index) * scale)
        mean = torch.where(overflowed, scaled.div_(count).div_(scale), mean)
    return torch.where(equal, first, mean)


def _as_real(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.float32) if values.dtype == torch.complex64 else values
