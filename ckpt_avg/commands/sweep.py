"""`sweep`: which window of checkpoints to average, the last k or the first k of a run, each measured.

The windows are averaged in groups: as many as fit into the memory given are computed in one pass over the files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ckpt_avg.choices import BestMode
from ckpt_avg.commands.averages import Averages, at_once
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.prepare import Prepared, prepare
from ckpt_avg.commands.requests import SweepRequest, takes
from ckpt_avg.commands.resume import LAST, Measurements, check_resume, key_of
from ckpt_avg.commands.weighting import weighting_of
from ckpt_avg.engine import engine_for
from ckpt_avg.errors import UserCodeError
from ckpt_avg.mean.memory_output import MemoryOutput
from ckpt_avg.progress import Phase
from ckpt_avg.results import Result, Rows, counted, notices_counted, numbers, paths_counted, plain
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import escaped, plural, quote
from ckpt_avg.user_code.comparison import Change, Evaluation, compare

Side = Literal["last", "first"]


@dataclass(frozen=True, slots=True, repr=False)
class Measured(Result):
    """One window of a sweep.

    Attributes:
        side: ``last`` or ``first``.
        checkpoints: what was averaged, in the order of the sum.
        metrics, samples: what was measured of the average, as in `Evaluation`.
        weighting: the rule for its weights, for example ``mean`` or ``ema:1000``.
        weights: of the checkpoints, in the order of the sum; None if all are equal.
    """

    side: Side
    checkpoints: tuple[Path, ...]
    metrics: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    weighting: str = "mean"
    weights: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, with the number of checkpoints as ``size``."""
        return {**plain(self), "size": len(self.checkpoints)}

    @property
    def name(self) -> str:
        """What to call it: ``the last 8``, with the rule for its weights if that is not the mean."""
        rule = "" if self.weighting == "mean" else f", {self.weighting}"
        return f"the {self.side} {len(self.checkpoints)}{rule}"

    def _title(self) -> str:
        return f"{self.name}: {numbers(self.metrics)}"


@dataclass(frozen=True, slots=True, repr=False)
class SweepResult(Result):
    """What `sweep` measured.

    Attributes:
        checkpoints: all that were selected, in order.
        steps: that each records, in the same order; None if it records none. Epochs if ``unit`` says so.
        unit: ``step`` or ``epoch``.
        skipped: files of run folders that were skipped, with reasons.
        last: the last checkpoint as it was saved.
        reference: what the averages are compared with: the last checkpoint, its statistics refreshed if theirs are.
        weightings: the rules for weights that were compared.
        windows: the averages: each window with each rule. Those with the same weights are measured once.
        metric, mode: by which metric they are compared, and whether ``min`` or ``max`` is better.
        split: as given.
        best: the best of the windows; ties go to the one with the fewest checkpoints, then to the last ones, then to
            the rule that is listed first.
        change: how the best differs from the reference.
        refreshed: whether the statistics of each were recomputed.
        passes: how many times the checkpoints were read.
        engine: ``native`` or ``torch``, which averaged them.
        notices: what the user should know.
    """

    checkpoints: tuple[Path, ...]
    steps: tuple[int | None, ...]
    unit: str
    skipped: tuple[Skipped, ...]
    last: Evaluation
    reference: Evaluation
    weightings: tuple[str, ...]
    windows: tuple[Measured, ...]
    metric: str
    mode: BestMode
    split: str | None
    best: Measured
    change: Change
    refreshed: bool
    passes: int
    engine: str
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg sweep --json`` prints them, without its ``command``."""
        from ckpt_avg.commands.documents import sweep_json

        return sweep_json(self)

    def _title(self) -> str:
        return f"best is {self.best._title()}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "best", paths_counted(self.best.checkpoints)
        yield "metric", f"{escaped(self.metric)}, {self.mode} is better"
        yield "change", f"{self.change._title()}, from {escaped(self.reference.name)}"
        yield "windows", counted(self.windows, (each.name for each in self.windows))
        yield "weightings", "" if len(self.weightings) == 1 else ", ".join(self.weightings)
        yield "checkpoints", paths_counted(self.checkpoints)
        yield "skipped", paths_counted([each.path for each in self.skipped])
        yield "notices", notices_counted(self.notices)

    def _tables(self) -> Iterator[Rows]:
        names = list(self.reference.metrics)
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(self.windows, key=lambda each: (each is not self.best, sign * each.metrics[self.metric]))
        measured = [(each.name, each.metrics) for each in ranked] + [(self.reference.name, self.reference.metrics)]
        rows = [(name, *(f"{metrics[metric]:.6g}" for metric in names)) for name, metrics in measured]
        yield Rows("windows, the best first", ("average of", *names), rows)


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
    with Context(progress=request.callbacks) as context:
        context.phase(Phase("opening checkpoints"))
        discovery = request.discover()
        file = check_resume(request, discovery)
        request, prepared = prepare(discovery, request, context, by_window=True)
        averages = Averages(request, prepared, context)
        planned = _plan(request, prepared, context)
        distinct = list({each.average: each for each in reversed(planned)}.values())[::-1]
        option, metric = request.target
        frozen = averages.frozen(prepared.checkpoints)
        together = at_once(request.hold, prepared)
        context.phases_left = 2 if frozen is None else 3
        with Measurements("sweep", request, prepared, context, averages.meter, file) as kept:
            last = reference = kept.measure(LAST, lambda: averages.measure_last(request))
            found = _measure(averages, distinct, kept, context, together)
            if frozen is not None:
                refreshed = kept.measure("reference", lambda: _refreshed(averages, prepared, context, last, frozen))
                reference = replace(refreshed, path=last.path)
        measured = [_measured(averages, each, found[each.average]) for each in planned]
        best = _best(measured, metric, request.sign)
        averages.meter.notice_chance()
        _notice_nan(measured, metric, context)
        best_average = Evaluation("", None, best.metrics, reference.refreshed, best.samples)
        changes = compare(reference, best_average, {metric: option == "--maximize"})
        return SweepResult(
            checkpoints=tuple(spec.path for spec in prepared.specs),
            steps=prepared.selected.moments,
            unit=prepared.selected.unit or "step",
            skipped=prepared.selected.skipped,
            last=last,
            reference=reference,
            weightings=tuple(request.rules),
            windows=tuple(measured),
            metric=metric,
            mode="max" if option == "--maximize" else "min",
            split=request.split,
            best=best,
            change=next(change for change in changes if change.metric == metric),
            refreshed=prepared.refresh is not None,
            passes=-(-len(distinct) // together),
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


@dataclass(frozen=True, slots=True)
class _Planned:
    """An average to measure: a window, the rule for its weights, and these in the order of its indices."""

    window: Window
    rule: str
    weights: tuple[float, ...] | None

    @property
    def average(self) -> tuple[Window, tuple[float, ...] | None]:
        """What is the same for rules that give the same average."""
        return self.window, self.weights

    @property
    def key(self) -> str:
        """The key of its measurement."""
        return key_of(self.window.indices, _by_index(self))


def _plan(request: SweepRequest, prepared: Prepared, context: Context) -> list[_Planned]:
    """Returns each window with each rule. Raises IncompatibleError if the checkpoints lack what a rule needs."""
    planned = []
    for window in windows_of(len(prepared.checkpoints), request.windows):
        for rule, options in request.rules.items():
            weights = weighting_of(options, prepared.selected, window.indices, context.notice)
            planned.append(_Planned(window, rule, None if weights is None else weights.values))
    return planned


def _measure(
    averages: Averages, planned: Sequence[_Planned], kept: Measurements, context: Context, together: int
) -> dict[object, Evaluation]:
    """Averages as many at a time as memory holds, in one pass; then refreshes and measures one after the other."""
    several = len({each.rule for each in planned}) > 1
    found: dict[object, Evaluation] = {}
    context.phase(Phase(f"measuring {plural(len(planned), 'window')}", len(planned), "windows"))
    for start in range(0, len(planned), together):
        group = planned[start : start + together]
        needed = [each for each in group if not kept.has(each.key)]
        outputs = averages.compute([each.window.indices for each in needed], list(map(_by_index, needed)))
        for each in group:
            # The memory of an average is free after it is measured.
            name = f"{each.window.name}, {each.rule}" if several else each.window.name
            measure = partial(_measure_one, averages, name, each, outputs)
            found[each.average] = kept.measure(each.key, measure)
    return found


def _measure_one(averages: Averages, name: str, planned: _Planned, outputs: list[MemoryOutput]) -> Evaluation:
    return averages.measure(name, planned.window.indices, outputs.pop(0))


def _refreshed(
    averages: Averages, prepared: Prepared, context: Context, last: Evaluation, frozen: Collection[str]
) -> Evaluation:
    context.phase(Phase(f"measuring {last.name}, refreshed"))
    return averages.meter.measure_refreshed(prepared.last, last.name, frozen)


def _measured(averages: Averages, planned: _Planned, found: Evaluation) -> Measured:
    order, weights = averages.order(planned.window.indices), _by_index(planned)
    return Measured(
        planned.window.side,
        averages.paths(planned.window.indices),
        found.metrics,
        found.samples,
        planned.rule,
        None if weights is None else tuple(weights[index] for index in order),
    )


def _by_index(planned: _Planned) -> dict[int, float] | None:
    return None if planned.weights is None else dict(zip(planned.window.indices, planned.weights, strict=True))


def _notice_nan(windows: Sequence[Measured], metric: str, context: Context) -> None:
    """Tells the user which checkpoints may be the cause if some averages measure NaN."""
    unclear = [window for window in windows if math.isnan(window.metrics[metric])]
    if unclear:
        context.notice(
            f"{quote(metric)} is NaN for {len(unclear)} of {plural(len(windows), 'average')}, so none of these is the "
            "best. ckpt-avg compare names checkpoints that are far off; skip them with --exclude"
        )


def _best(windows: Sequence[Measured], metric: str, sign: float) -> Measured:
    known = [window for window in windows if not math.isnan(window.metrics[metric])]
    if not known:
        raise UserCodeError(f"the --eval function: {quote(metric)} is NaN for every average. Return a number.")
    # min returns the first of several that are equal.
    return min(known, key=lambda window: (-sign * window.metrics[metric], len(window.checkpoints)))
