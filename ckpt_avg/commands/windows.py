"""The averages of many windows of checkpoints, measured one after the other, in few passes over the files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ckpt_avg.batchnorm.policy import frozen_buffers, moving_layers
from ckpt_avg.batchnorm.refresh_output import RefreshOptions, frozen_layers, refresh_output
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.mean.stream import Mean, MemoryOutput, write_means
from ckpt_avg.progress import Progress
from ckpt_avg.user_code.evaluate import Evaluate, evaluate_weights

Side = Literal["last", "first"]
SIDES = ("last", "first", "both")


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive checkpoints: the last k of a run, or the first k.

    Attributes:
        side: ``last`` or ``first``.
        members: their indices in the run.
    """

    side: Side
    members: range


@dataclass(frozen=True, slots=True)
class Work:
    """How windows are averaged and measured.

    Attributes:
        function: the user's metric.
        model: takes the weights.
        refresh: how to refresh.
        device: where to compute the means.
        threads, memory: of the mean.
        held: bytes of averages that may wait in memory to be measured; one is always held.
        allow_nonfinite: let NaN and Inf of the inputs through.
        progress: told of each pass, refresh and measurement.
    """

    function: Evaluate
    model: torch.nn.Module
    refresh: RefreshOptions
    device: torch.device
    threads: int
    memory: int
    held: int
    allow_nonfinite: bool
    progress: Progress


def windows_of(count: int, sides: str) -> list[Window]:
    """Returns the last 1, 2, … of ``count`` checkpoints, the first 1, 2, …, or both; all of them stand there once."""
    last = [Window("last", range(count - size, count)) for size in range(1, count + 1)]
    first = [Window("first", range(size)) for size in range(1, count + 1)]
    if sides == "both":
        return last + first[:-1]
    return last if sides == "last" else first


def measure_windows(
    ready: Prepared, windows: Sequence[Window], work: Work
) -> Iterator[tuple[Window, dict[str, float]]]:
    """Averages and measures windows in their order; yields the metrics of each.

    The averages are those that `average` writes, bit for bit: each is summed on its own, in the order of the
    checkpoints. As many as fit into the memory given are computed in one pass over the checkpoints that they need.

    Raises:
        CkptAvgError: as `average`, but for the output.
    """
    for group in passes(ready, windows, work.held):
        outputs = _average(ready, group, work)
        for window in group:
            yield window, _measure(ready, window, outputs.pop(0), work)


def passes(ready: Prepared, windows: Sequence[Window], held: int) -> list[Sequence[Window]]:
    """Returns the windows in groups, each of which is averaged in one pass over its checkpoints."""
    at_once = max(1, held // max(1, ready.plan.nbytes))
    return [windows[start : start + at_once] for start in range(0, len(windows), at_once)]


def _average(ready: Prepared, windows: Sequence[Window], work: Work) -> list[MemoryOutput]:
    first = min(window.members.start for window in windows)
    stop = max(window.members.stop for window in windows)
    needed = ready.checkpoints[first:stop]
    outputs = [MemoryOutput(ready.plan) for _ in windows]
    means = [
        Mean(range(window.members.start - first, window.members.stop - first), output.write)
        for window, output in zip(windows, outputs, strict=True)
    ]
    work.progress.start(sum(checkpoint.spec.nbytes for checkpoint in needed))
    write_means(
        needed,
        ready.plan,
        means,
        device=work.device,
        threads=work.threads,
        memory=work.memory,
        allow_nonfinite=work.allow_nonfinite,
        progress=work.progress.read,
    )
    return outputs


def _measure(ready: Prepared, window: Window, output: MemoryOutput, work: Work) -> dict[str, float]:
    name = f"the {window.side} {len(window.members)}"
    members = ready.checkpoints[window.members.start : window.members.stop]
    if ready.refresh is not None:
        frozen = frozen_buffers(members, ready.plan)
        if moving_layers(ready.plan, frozen):
            refresh_output(
                ready.refresh,
                ready.plan,
                output.tensors,
                output.write,
                frozen=frozen_layers(ready.refresh, frozen),
                options=work.refresh,
                progress=work.progress,
            )
    work.progress.evaluating(name)
    return evaluate_weights(
        work.function,
        work.model,
        output.tensors(),
        name=name,
        device=work.refresh.device,
        notice=work.progress.notice,
    )
