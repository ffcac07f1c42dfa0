"""`sweep`: which window of checkpoints to average, the last k or the first k of a run, each measured.

The windows are averaged in groups: as many as fit into the memory given are computed in one pass over the files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckpt_avg.batchnorm.policy import frozen_buffers, moving_layers
from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.evaluations import Meter
from ckpt_avg.commands.prepare import Prepared, prepare
from ckpt_avg.commands.requests import SweepRequest, takes
from ckpt_avg.engine import engine_for
from ckpt_avg.errors import IncompatibleError, UsageError, UserCodeError
from ckpt_avg.mean.spectral_norm import leading_vectors
from ckpt_avg.mean.stream import Mean, MemoryOutput, write_means, write_tensors
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import listing, quote, suggestion
from ckpt_avg.user_code.comparison import Change, Evaluation, compare
from ckpt_avg.user_code.model import weights_of

Side = Literal["last", "first"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One window of a sweep.

    Attributes:
        side: ``last`` or ``first``.
        checkpoints: what was averaged, in the order of the sum.
        metrics, samples: what was measured of the average, as in `Evaluation`.
    """

    side: Side
    checkpoints: tuple[Path, ...]
    metrics: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What `sweep` measured.

    Attributes:
        checkpoints: all that were selected, in order.
        skipped: files of run folders that were skipped, with reasons.
        last: the last checkpoint as it was saved.
        reference: what the averages are compared with: the last checkpoint, its statistics refreshed if theirs are.
        windows: the averages, in the order in which they were measured.
        metric, mode: by which metric they are compared, and whether ``min`` or ``max`` is better.
        best: the best of the windows; ties go to the one with the fewest checkpoints, then to the last ones.
        change: how the best differs from the reference.
        refreshed: whether the statistics of each were recomputed.
        passes: how many times the checkpoints were read.
        engine: ``native`` or ``torch``, which averaged them.
        notices: what the user should know.
    """

    checkpoints: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    last: Evaluation
    reference: Evaluation
    windows: tuple[Measured, ...]
    metric: str
    mode: str
    best: Measured
    change: Change
    refreshed: bool
    passes: int
    engine: str
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive checkpoints of a run, by their indices: the last k, or the first k."""

    side: Side
    indices: range

    @property
    def name(self) -> str:
        """What to call its average."""
        return f"the {self.side} {len(self.indices)}"


@takes(SweepRequest)
def sweep(request: SweepRequest) -> SweepResult:
    """Measures the average of the last k checkpoints for each k, and of the first k, each with its own refresh.

    Every average is what `average` would write for these checkpoints, bit for bit. Nothing is written.

    Args:
        The fields of `SweepRequest`.

    Returns:
        What was measured.

    Raises:
        CkptAvgError: as `average`, except OutputError.

    Example:
        >>> import sys
        >>> sys.path.insert(0, "fixtures/mnist_cnn")
        >>> from train import evaluate, make_model
        >>> run = "fixtures/mnist_cnn"
        >>> result = sweep(run, evaluate=evaluate, model=make_model, bn="keep", last=3, minimize="loss")
        >>> [(window.side, len(window.checkpoints)) for window in result.windows]
        [('last', 1), ('last', 2), ('last', 3), ('first', 1), ('first', 2)]
    """
    with Context(progress=request.progress) as context:
        prepared = prepare(request.discover(), request, context, by_window=True)
        if len(prepared.checkpoints) < 2:
            raise IncompatibleError(f"{prepared.specs[0].path}: is the only checkpoint. Name at least two to compare.")
        option, metric = request.target
        meter = Meter(request, prepared, context)
        newest = prepared.last.spec
        last = meter.measure(newest.name, newest.path, weights_of(prepared.last))
        if metric not in last.metrics:
            raise UsageError(
                f"{option} {metric}: the --eval function returns no such metric. Use one of "
                f"{listing(map(quote, last.metrics))}.{suggestion(metric, last.metrics)}"
            )
        groups = passes(windows_of(len(prepared.checkpoints), request.windows), request.hold, prepared.plan.nbytes)
        measured = [each for group in groups for each in _measure(request, prepared, context, group, meter)]
        frozen = _frozen(request, prepared, prepared.checkpoints)
        reference = last if frozen is None else meter.measure_refreshed(prepared.last, newest.name, frozen)
        best = _best(measured, metric, highest=option == "--maximize")
        meter.notice_chance()
        best_average = Evaluation("", None, best.metrics, reference.refreshed, best.samples)
        changes = compare(reference, best_average, {metric: option == "--maximize"})
        return SweepResult(
            checkpoints=tuple(spec.path for spec in prepared.specs),
            skipped=prepared.selected.skipped,
            last=last,
            reference=reference,
            windows=tuple(measured),
            metric=metric,
            mode="max" if option == "--maximize" else "min",
            best=best,
            change=next(change for change in changes if change.metric == metric),
            refreshed=prepared.refresh is not None,
            passes=len(groups),
            engine=engine_for(prepared.mean_device),
            notices=tuple(context.notices),
        )


def windows_of(count: int, sides: str) -> list[Window]:
    """Returns the last 1, 2, … of ``count`` checkpoints, the first 1, 2, …, or both; all of them are one window."""
    last = [Window("last", range(count - size, count)) for size in range(1, count + 1)]
    first = [Window("first", range(size)) for size in range(1, count + 1)]
    if sides == "both":
        return last + first[:-1]
    return last if sides == "last" else first


def passes(windows: Sequence[Window], hold: int, nbytes: int) -> list[Sequence[Window]]:
    """Returns the windows in groups, each for one pass over the checkpoints; ``hold`` bytes of averages are held."""
    at_once = max(1, hold // max(1, nbytes))
    return [windows[start : start + at_once] for start in range(0, len(windows), at_once)]


def _measure(
    request: SweepRequest, prepared: Prepared, context: Context, windows: Sequence[Window], meter: Meter
) -> list[Measured]:
    """Averages some windows in one pass, then refreshes and measures one after the other."""
    measured = []
    outputs = _average(request, prepared, context, windows)
    for window in windows:
        output = outputs.pop(0)  # its memory is free after it is measured
        checkpoints = prepared.checkpoints[window.indices.start : window.indices.stop]
        if len(checkpoints) > 1:
            vectors = leading_vectors(prepared.plan, checkpoints[-1], output.tensors(), context.notice)
            write_tensors(vectors, prepared.plan, output.write)
        found = meter.measure(window.name, None, output.tensors(), frozen=_frozen(request, prepared, checkpoints))
        paths = tuple(prepared.specs[index].path for index in prepared.selected.sum_order if index in window.indices)
        measured.append(Measured(window.side, paths, found.metrics, found.samples))
    return measured


def _frozen(request: SweepRequest, prepared: Prepared, checkpoints: Sequence[Checkpoint]) -> Collection[str] | None:
    """Returns the statistics of these checkpoints that a refresh keeps; None if there is nothing to refresh."""
    if prepared.refresh is None:
        return None
    frozen = frozen_buffers(checkpoints, prepared.plan, request.bn)
    return frozen if moving_layers(prepared.plan, frozen) else None


def _average(
    request: SweepRequest, prepared: Prepared, context: Context, windows: Sequence[Window]
) -> list[MemoryOutput]:
    """Averages windows in one pass over the checkpoints that they need, each summed on its own, as `average` does."""
    first = min(window.indices.start for window in windows)
    needed = max(window.indices.stop for window in windows) - first
    outputs = [MemoryOutput(prepared.plan) for _ in windows]
    means = [
        Mean([index - first for index in prepared.selected.sum_order if index in window.indices], output.write)
        for window, output in zip(windows, outputs, strict=True)
    ]
    context.progress.start(needed * prepared.plan.source_nbytes)
    write_means(
        prepared.checkpoints[first:],
        prepared.plan,
        means,
        device=prepared.mean_device,
        threads=prepared.threads,
        memory=request.memory,
        readers=request.readers,
        allow_nonfinite=request.allow_nonfinite,
        progress=context.progress.read,
    )
    return outputs


def _best(windows: Sequence[Measured], metric: str, *, highest: bool) -> Measured:
    known = [window for window in windows if not math.isnan(window.metrics[metric])]
    if not known:
        raise UserCodeError(f"the --eval function: {quote(metric)} is NaN for every average. Return a number.")
    sign = -1.0 if highest else 1.0
    # min returns the first of several that are equal.
    return min(known, key=lambda window: (sign * window.metrics[metric], len(window.checkpoints)))
