"""`sweep`: which window of checkpoints to average, the last k or the first k of a run, each measured.

The windows are averaged in groups: as many as fit into the memory given are computed in one pass over the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckpt_avg.commands.averages import Averages, at_once
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.prepare import prepare
from ckpt_avg.commands.requests import SweepRequest, takes
from ckpt_avg.engine import engine_for
from ckpt_avg.errors import UserCodeError
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import quote
from ckpt_avg.user_code.comparison import Change, Evaluation, compare

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
        split: as given.
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
    split: str | None
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
        averages = Averages(request, prepared, context)
        option, metric = request.target
        last = averages.measure_last(request)
        windows = windows_of(len(prepared.checkpoints), request.windows)
        groups = passes(windows, at_once(request.hold, prepared))
        measured = [each for group in groups for each in _measure(averages, group)]
        frozen = averages.frozen(prepared.checkpoints)
        reference = last if frozen is None else averages.meter.measure_refreshed(prepared.last, last.name, frozen)
        best = _best(measured, metric, request.sign)
        averages.meter.notice_chance()
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
            split=request.split,
            best=best,
            change=next(change for change in changes if change.metric == metric),
            refreshed=prepared.refresh is not None,
            passes=averages.passes,
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


def passes(windows: Sequence[Window], together: int) -> list[Sequence[Window]]:
    """Returns the windows in groups, each for one pass over the checkpoints."""
    return [windows[start : start + together] for start in range(0, len(windows), together)]


def _measure(averages: Averages, windows: Sequence[Window]) -> list[Measured]:
    """Averages some windows in one pass, then refreshes and measures one after the other."""
    measured = []
    outputs = averages.compute([window.indices for window in windows])
    for window in windows:
        # The memory of an average is free after it is measured.
        found = averages.measure(window.name, window.indices, outputs.pop(0))
        measured.append(Measured(window.side, averages.paths(window.indices), found.metrics, found.samples))
    return measured


def _best(windows: Sequence[Measured], metric: str, sign: float) -> Measured:
    known = [window for window in windows if not math.isnan(window.metrics[metric])]
    if not known:
        raise UserCodeError(f"the --eval function: {quote(metric)} is NaN for every average. Return a number.")
    # min returns the first of several that are equal.
    return min(known, key=lambda window: (-sign * window.metrics[metric], len(window.checkpoints)))
