"""The streaming mean: float64 sums in checkpoint order, one true division, one correctly rounded cast.

Each element is computed alone, so the bytes do not depend on chunks, threads or the device. Working memory is bounded
by the budget that the caller gives: a worker holds, of each checkpoint, one window of pages, and gives it back when
the window is done.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import prefetch, read_stretch, torch_dtype
from ckpt_avg.errors import UsageError
from ckpt_avg.machine.collector import collector_paused
from ckpt_avg.mean.averager import LEAST_CHUNK, Averager
from ckpt_avg.mean.blocks import Run
from ckpt_avg.mean.plan import Piece, Plan

# Elements summed at a time: few enough for the float64 sum and the widened input, 2 MiB together, to stay near a core,
# and enough to outweigh the calls.
_CHUNK = 128 * 1024
_CUDA_CHUNK = 1024 * 1024  # there a chunk must outweigh the launch of a kernel
_WINDOW = 8 * 1024 * 1024  # a task of more elements gains nothing
_TASKS = 2  # for each worker at least, so that none is left over with much to do

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


def divide_memory(
    memory: int, plan: Plan, *, threads: int, checkpoints: int, device: torch.device, parts: int = 1
) -> Budget:
    """Divides ``memory`` bytes between the workers, of whom each of ``parts`` processes has so many ``threads``.

    Each holds, for every element of its window, its bytes in each checkpoint and in the output, and for every element
    of its chunk a sum and a widened input (32 bytes, since a complex element has two parts). The same budget therefore
    holds whatever the number of checkpoints: their windows get smaller.
    """
    each = memory // threads
    chunk = max(LEAST_CHUNK, min(_CHUNK if device.type == "cpu" else _CUDA_CHUNK, each // 64))
    share = max(chunk, sum(tensor.numel for tensor in plan.tensors) // (_TASKS * threads * parts))
    window = max(LEAST_CHUNK, min(_WINDOW, share, (each - 32 * chunk) // _bytes_of_element(plan, checkpoints)))
    return Budget(threads, min(chunk, window), window)


def _bytes_of_element(plan: Plan, checkpoints: int) -> int:
    """Returns what one element takes in all that is read of it, and in the output: of what is copied one is read."""
    kinds = {(tensor.source_dtype, tensor.dtype, tensor.rule == "mean") for tensor in plan.tensors}
    return max((checkpoints if is_mean else 1) * source.itemsize + target.itemsize for source, target, is_mean in kinds)


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
        following: list[Run] | None = worker.prepare(take())
        while following is not None and not stop.is_set():
            runs, following = following, worker.prepare(take())
            nbytes = worker.run(runs)
            with lock:
                progress(nbytes)

    def take() -> tuple[Piece, ...] | None:
        with lock:
            return next(tasks, None)

    before = torch.get_num_threads()
    try:
        with collector_paused(), ThreadPoolExecutor(budget.threads, thread_name_prefix="mean") as pool:
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
        self._averager = Averager(device, budget.chunk, checkpoints, allow_nonfinite=allow_nonfinite)
        self._buffer = mmap.mmap(-1, budget.window * 8)
        self._output = torch.frombuffer(self._buffer, dtype=torch.uint8)

    def run(self, runs: Sequence[Run]) -> int:
        """Computes one task for every target and writes it; returns the input bytes read."""
        inputs = [self._read(run) for run in runs]
        for target in self._targets:
            filled = 0
            for run, values in zip(runs, inputs, strict=True):
                nbytes = run.numel * run.dtype.itemsize
                output = self._output[filled : filled + nbytes].view(torch_dtype(run.dtype))
                if run.is_mean:
                    self._averager.average(run, [values[index] for index in target.checkpoints], output)
                else:
                    output.copy_(values[target.checkpoints[-1]])
                filled += nbytes
            target.write(memoryview(self._buffer)[:filled], runs[0].offset)
        return len(self._averaged) * sum(run.numel * run.source_dtype.itemsize for run in runs)

    def prepare(self, task: tuple[Piece, ...] | None) -> list[Run] | None:
        """Returns a task's pieces in runs, and asks the system for what they need: it is read while others compute.

        What does not lie side by side in the inputs too must be copied together, so there only small pieces share a
        run, of no more than a chunk.
        """
        if task is None:
            return None
        runs: list[Run] = []
        for _, pieces in itertools.groupby(task, key=Run.kind):
            run = Run(tuple(pieces))
            sources = [self._checkpoints[index] for index in self._needed(run)]
            together = all(run.stretch(source).together for source in sources)
            runs += [run] if together else run.split(self._chunk)
        for run in runs:
            for index in self._needed(run):
                prefetch(self._checkpoints[index], run.stretch(self._checkpoints[index]))
        return runs

    def _needed(self, run: Run) -> set[int]:
        """Returns which checkpoints are read: what is copied comes from each target's last one alone."""
        return self._averaged if run.is_mean else self._copied

    def _read(self, run: Run) -> dict[int, torch.Tensor]:
        return {
            index: read_stretch(self._checkpoints[index], run.stretch(self._checkpoints[index]))
            for index in self._needed(run)
        }
