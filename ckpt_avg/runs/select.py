"""Which checkpoints to average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.formats.open import refuse_missing_prefix
from ckpt_avg.formats.reading import Reading
from ckpt_avg.progress import Progress
from ckpt_avg.runs.candidate import Candidate, excluding
from ckpt_avg.runs.candidates import COPY, open_candidates
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.runs.lr_minima import at_lr_minima
from ckpt_avg.runs.metric_log import LogUse, MetricLog, read_log
from ckpt_avg.runs.order import Unit, position, unit_of
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.runs.selection import Selection
from ckpt_avg.text import distinct_names, ends, escaped, listing, plural, quote, suggestion
from ckpt_avg.wording import setting, worded_all


@dataclass(frozen=True, slots=True)
class Selected:
    """The selected checkpoints.

    Attributes:
        checkpoints: open, in the order of their steps or epochs, if all record them.
        skipped: what is not averaged, and why.
        sum_order: their indices in the order in which they are summed.
        listed: their indices in the order of the sources.
        run: what each checkpoint of the run or its name records, selected or not.
        places: the selected ones' indices among these.
        log: the log whose metric selected them.
    """

    checkpoints: tuple[Checkpoint, ...]
    skipped: tuple[Skipped, ...]
    sum_order: tuple[int, ...]
    listed: tuple[int, ...]
    run: tuple[Record, ...]
    places: tuple[int, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """What each records."""
        return tuple(self.run[place] for place in self.places)

    @property
    def unit(self) -> Unit | None:
        """``step`` or ``epoch``, if all record one."""
        return unit_of(self.records)

    @property
    def moments(self) -> tuple[int | None, ...]:
        """The step of each, if it records one; epochs if no step orders them."""
        return tuple(record.epoch if self.unit == "epoch" else record.step for record in self.records)

    @property
    def copies(self) -> list[str]:
        """The names of files that were skipped because their weights are those of another."""
        return [escaped(each.path.name) for each in self.skipped if each.reason.startswith(COPY)]

    def refuse_single(self) -> None:
        """Raises IncompatibleError if there is nothing to compare a checkpoint with; says which copies were skipped."""
        if len(self.checkpoints) < 2:
            skipped = f" ({listing(self.copies)}: skipped, as the weights are the same)" if self.copies else ""
            path = self.checkpoints[0].spec.path
            raise IncompatibleError(f"{path}: is the only checkpoint{skipped}. Name at least two to compare.")

    log: LogUse | None = None


def open_selected(
    discovery: Discovery,
    selection: Selection,
    reading: Reading,
    stack: ExitStack,
    progress: Progress | None = None,
    *,
    compare_in_full: bool = True,
) -> Selected:
    """Returns the selected checkpoints.

    Args:
        discovery: what the sources contain.
        selection: which checkpoints to use.
        reading: how to read them.
        stack: closes them.
        progress: told of each checkpoint that is opened, and of what the user should know.
        compare_in_full: whether copies are compared in full, or by a few bytes of each tensor.

    Raises:
        CkptAvgError: a selected checkpoint cannot be opened, or there is none.
    """
    progress = progress or Progress()
    notice = progress.notice
    found = open_candidates(discovery, reading, stack, selection, progress, compare_in_full=compare_in_full)
    for note in found.notes:
        notice(note)
    log = read_log(found.ordered, selection, notice) if selection.log is not None else None
    chosen = select(found.ordered, selection, notice, log)
    checkpoints = tuple(candidate.opened() for candidate in chosen)
    refuse_missing_prefix([checkpoint.spec for checkpoint in checkpoints], reading)
    kept = {id(candidate): index for index, candidate in enumerate(chosen)}
    for candidate in found.ordered:
        if candidate.checkpoint is not None and id(candidate) not in kept:
            candidate.checkpoint.close()
    use = log.use(chosen, log.metric(found.ordered, selection.metric)) if log is not None else None
    if use is not None:
        names = distinct_names([each.path for each in chosen])
        shown = [f"{escaped(name)} {value:.6g}" for name, value in zip(names, use.values, strict=True)]
        notice(f"by {quote(use.metric)} in {escaped(use.name)}: {listing(shown)}")
    listed = tuple(kept[id(each)] for each in found.given if id(each) in kept)
    return Selected(
        checkpoints,
        found.skipped,
        sum_order=listed if selection.keep_order else tuple(range(len(chosen))),
        listed=listed,
        run=tuple(candidate.record for candidate in found.ordered),
        places=tuple(place for place, candidate in enumerate(found.ordered) if id(candidate) in kept),
        log=use,
    )


def select(
    candidates: Sequence[Candidate],
    selection: Selection,
    notice: Callable[[str], None] = lambda text: None,
    log: MetricLog | None = None,
) -> tuple[Candidate, ...]:
    """Returns the candidates that `skipping_options` leaves."""
    skipped_by = skipping_options(candidates, selection, notice, log)
    return tuple(each for each, option in zip(candidates, skipped_by, strict=True) if not option)


def skipping_options(
    candidates: Sequence[Candidate],
    selection: Selection,
    notice: Callable[[str], None] = lambda text: None,
    log: MetricLog | None = None,
) -> tuple[str, ...]:
    """Returns for each candidate the option of a selection that skips it, or an empty string.

    The candidates are in order; ``include`` and ``exclude`` have been applied to their names. With a ``log`` of the
    candidates, ``best`` goes by its metrics.

    Raises:
        IncompatibleError: too few are left, or the run does not record what a rule needs.
    """
    skipped_by: dict[int, str] = {}

    def left() -> list[Candidate]:
        return [each for each in candidates if id(each) not in skipped_by]

    def keep(option: str, found: Iterable[Candidate]) -> None:
        kept = {id(each) for each in found}
        skipped_by.update({id(each): option for each in left() if id(each) not in kept})

    if selection.from_step is not None or selection.to_step is not None:
        keep(selection.bounds, _between(left(), selection, notice))
    if selection.at_lr_minima:
        keep("--at-lr-minima", at_lr_minima(left(), notice))
    if selection.every is not None:
        keep(f"--every {selection.every}", left()[::-1][:: selection.every])
    if selection.min_interval is not None:
        keep(f"--min-interval {selection.min_interval}", _apart(left(), selection.min_interval, notice))
    if selection.last is not None:
        keep(f"--last {selection.last}", _enough(left(), selection.last, "--last")[-selection.last :])
    if selection.best is not None:
        if log is None:
            metric, measured = _recorded(left(), selection.best, selection.metric, notice)
        else:
            metric = log.metric(candidates, selection.metric)
            measured = log.measured(left(), metric, notice)
        keep(f"{setting('--metric', metric)} is not recorded", [each for each, _ in measured])
        keep(f"--best {selection.best}", _best(measured, selection.best, highest=selection.mode == "max"))
    return worded_all(skipped_by.get(id(each), "") for each in candidates)


def _names(candidates: Sequence[Candidate]) -> str:
    return ends([escaped(candidate.path.name) for candidate in candidates])


def _enough(kept: list[Candidate], number: int, option: str) -> list[Candidate]:
    if len(kept) < number:
        raise IncompatibleError(
            f"{option} {number}: expected at least {plural(number, 'checkpoint')}, got {len(kept)} ({_names(kept)}). "
            f"Use {option} {len(kept)}, or name more checkpoints."
        )
    return kept


def _unit(candidates: Sequence[Candidate], option: str) -> Unit:
    unit = unit_of(candidate.record for candidate in candidates)
    if unit is not None:
        return unit
    unclear = [candidate for candidate in candidates if candidate.record.is_lone_number]
    without_step = [candidate for candidate in candidates if candidate.record.step is None] or unclear
    if all(candidate.record.epoch is not None for candidate in without_step):
        raise IncompatibleError(
            f"{option}: expected a step in every checkpoint, or an epoch in every one, got only epochs in "
            f"{_names(without_step)} and only steps in others. Select one kind with --include or --exclude."
        )
    raise IncompatibleError(
        f"{option}: expected a step or an epoch in every checkpoint, got none in {_names(without_step)}. Skip these "
        "with --exclude, or select others with --include."
    )


def _between(kept: list[Candidate], selection: Selection, notice: Callable[[str], None]) -> list[Candidate]:
    first, last = selection.from_step, selection.to_step
    unit = _unit(kept, "--from-step" if first is not None else "--to-step")
    positions = [position(candidate.record, unit) for candidate in kept]
    found = [
        candidate
        for candidate, at in zip(kept, positions, strict=True)
        if (first is None or first <= at) and (last is None or at <= last)
    ]
    if not found:
        raise IncompatibleError(
            f"nothing to average: none of {plural(len(kept), 'checkpoint')} matches {selection.bounds}; their "
            f"{unit}s are {min(positions)} to {max(positions)}. Choose other bounds."
        )
    if unit == "epoch":
        notice(f"{selection.bounds}: the run records no steps, so these are epochs")
    return found


def _apart(kept: list[Candidate], interval: int, notice: Callable[[str], None]) -> list[Candidate]:
    option = f"--min-interval {interval}"
    unit = _unit(kept, option)
    positions = [position(candidate.record, unit) for candidate in kept]
    if positions != sorted(positions):
        shown = ends([str(at) for at in positions])
        raise IncompatibleError(
            f"{option}: expected {unit}s that rise from checkpoint to checkpoint, got {shown} in "
            f"{_names(kept)}. Use --every or --include instead."
        )
    found = kept[-1:]
    for candidate, at in zip(kept[-2::-1], positions[-2::-1], strict=True):
        if position(found[-1].record, unit) - at >= interval:
            found.append(candidate)
    if unit == "epoch":
        notice(f"{option}: the run records no steps, so these are epochs")
    return found[::-1]


def _recorded(
    kept: list[Candidate], number: int, metric: str | None, notice: Callable[[str], None]
) -> tuple[str, list[tuple[Candidate, float]]]:
    """Returns a metric, or the only one, and the checkpoints that record it, with its values."""
    recorded = sorted({name for candidate in kept for name in candidate.record.metrics})
    if metric is None and len(recorded) == 1:
        metric = recorded[0]
    if metric is None or metric not in recorded:
        if not recorded:
            raise IncompatibleError(
                f"--best {number}: the checkpoints record no metrics. Add --log FILE, or use --last or --include."
            )
        found = f"the checkpoints record {listing(map(quote, recorded))}"
        if metric is None:
            raise IncompatibleError(f"--best {number}: {found}. Choose one of them with --metric.")
        advice = suggestion(metric, recorded) or " Use one of these."
        raise IncompatibleError(f"{setting('--metric', metric)}: {found}.{advice}")
    measured = [candidate for candidate in kept if metric in candidate.record.metrics]
    if len(measured) < len(kept):
        lacking = [candidate for candidate in kept if metric not in candidate.record.metrics]
        notice(f"skipped, because they record no {quote(metric)}: {_names(lacking)}")
    if unclear := [candidate for candidate in measured if not isfinite(candidate.record.metrics[metric])]:
        shown = ends([f"{each.record.metrics[metric]} in {escaped(each.path.name)}" for each in unclear])
        raise IncompatibleError(
            f"--best {number}: expected finite numbers as {quote(metric)}, got {shown}. To rank the others, add "
            f"{excluding(unclear)}."
        )
    return metric, [(candidate, candidate.record.metrics[metric]) for candidate in measured]


def _best(measured: list[tuple[Candidate, float]], number: int, *, highest: bool) -> list[Candidate]:
    """Returns the best ones, in any order; of equal ones the later."""
    _enough([candidate for candidate, _ in measured], number, "--best")
    sign = -1.0 if highest else 1.0
    newest_first = measured[::-1]
    ranked = sorted(newest_first, key=lambda each: sign * each[1])  # keeps the order of ties
    return [candidate for candidate, _ in ranked[:number]]
