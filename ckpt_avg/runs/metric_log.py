"""Metrics of checkpoints from a log that the user names: ``--log FILE --log-step COLUMN``.

A row counts for a checkpoint if it has exactly its step (or epoch): no other row stands in for it. Of several values of
a metric at one step the last counts.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record, measure, number_in
from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.files.missing import missing
from ckpt_avg.limits import LIMITS
from ckpt_avg.runs.candidate import Candidate, excluding
from ckpt_avg.runs.log_rows import read_rows
from ckpt_avg.runs.log_step import StepColumn, number_of, other_reading
from ckpt_avg.runs.order import Unit, unit_of
from ckpt_avg.runs.selection import LogOptions
from ckpt_avg.text import ends, escaped, listing, quote, suggestion
from ckpt_avg.wording import setting

Notice = Callable[[str], None]

_NOTHING = frozenset(("", "none", "null", "na", "n/a", "-"))  # what a table has in a cell without a value
# Columns that are not offered as metrics: trainer/global_step, train/lr, eval_runtime.
_NO_METRIC = re.compile(
    r"(.*[/._ -])?(epochs?|steps?|global_step|iter(ation)?s?|lr|learning_rate|time|runtime|timestamp|memory)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Logged:
    """A value in a log.

    Attributes:
        cell: what is there.
        where: its place, such as ``line 12``.
        earlier: another value before it, for the same step.
    """

    cell: object
    where: str
    earlier: Logged | None = None

    @property
    def value(self) -> float | None:
        """The finite number that it is; None if it is none."""
        return measure(number_in(self.cell) if isinstance(self.cell, str) else self.cell)

    def __str__(self) -> str:
        return f"{escaped(str(self.cell))} in {self.where}"


@dataclass(frozen=True, slots=True)
class LogUse:
    """What is recorded of a log by which checkpoints were selected.

    Attributes:
        name: of the file, without its folder.
        step: the column of the steps, as it was given.
        metric: the one that decided.
        values: its values for the selected checkpoints, in order.
    """

    name: str
    step: str
    metric: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MetricLog:
    """What a log says of checkpoints.

    Attributes:
        path: the log.
        step: where it tells the steps.
        unit: what these count.
        columns: the other columns.
        found: step → column → the last value, for the steps of the checkpoints.
    """

    path: Path
    step: StepColumn
    unit: Unit
    columns: Sequence[str]
    found: Mapping[int, Mapping[str, Logged]] = field(repr=False)

    def metrics_of(self, record: Record) -> dict[str, float]:
        """Returns the metrics that are logged at the step of a checkpoint."""
        logged = {name: each.value for name, each in self._at(record).items() if not _NO_METRIC.fullmatch(name)}
        return {name: value for name, value in logged.items() if value is not None}

    def metric(self, candidates: Sequence[Candidate], given: str | None) -> str:
        """Returns the metric that was named, or the only one.

        Raises:
            IncompatibleError: the log does not have it, or has several.
        """
        if given is not None and given in self.columns:
            return given
        known = sorted({name for each in candidates for name in self.metrics_of(each.record)}) or self.columns
        if given is None and len(known) == 1:
            return known[0]
        has = f"{escaped(self.path.name)} has {listing(map(quote, known)) or 'no other columns'}"
        if given is None:
            raise IncompatibleError(f"--log: {has}. Choose one of them with --metric.")
        advice = suggestion(given, self.columns) or " Use one of these."
        raise IncompatibleError(f"{setting('--metric', given)}: {has}.{advice}")

    def measured(self, kept: Sequence[Candidate], metric: str, notice: Notice) -> list[tuple[Candidate, float]]:
        """Returns the checkpoints for which a metric is logged, with its values.

        Raises:
            IncompatibleError: it is logged for none, a value is no finite number, two checkpoints have one step, or
                none has a step.
        """
        kept = self._numbered(kept, notice)
        logged = [(each, found) for each in kept if (found := self._at(each.record).get(metric)) is not None]
        self._tell_lacking(kept, [each for each in kept if metric not in self._at(each.record)], metric, notice)
        self._refuse_repeated([each for each, _ in logged])
        unclear = [(each, found) for each, found in logged if found.value is None]
        if unclear:
            places = listing(f"{found} for {escaped(each.path.name)}" for each, found in unclear)
            others = f"To rank the others, add {excluding(each for each, _ in unclear)}"
            advice = others if len(unclear) < len(logged) else "Name another column with --metric, or write numbers"
            raise IncompatibleError(f"{self.path}: expected finite numbers as {quote(metric)}, got {places}. {advice}.")
        changed = [(each, found) for each, found in logged if found.earlier is not None]
        if changed:
            steps = self._steps_of([each for each, _ in changed])
            notice(
                f"{escaped(self.path.name)}: several values of {quote(metric)} at {steps}: the last counts, for "
                f"example {changed[0][1]}, not {changed[0][1].earlier}"
            )
        return [(each, found.value or 0.0) for each, found in logged]

    def use(self, chosen: Sequence[Candidate], metric: str) -> LogUse:
        """Returns what is recorded of the log."""
        values = tuple(self._at(each.record)[metric].value or 0.0 for each in chosen)
        return LogUse(self.path.name, self.step.given, metric, values)

    def _at(self, record: Record) -> Mapping[str, Logged]:
        number = number_of(record, self.unit)
        return {} if number is None else self.found.get(number, {})

    def _steps_of(self, candidates: Sequence[Candidate]) -> str:
        numbers = ends([str(number_of(each.record, self.unit)) for each in candidates])
        return f"{self.unit}{'s' if len(candidates) != 1 else ''} {numbers}"

    def _numbered(self, kept: Sequence[Candidate], notice: Notice) -> Sequence[Candidate]:
        """Returns the checkpoints that have a step (or epoch), and tells which have none."""
        without = [each for each in kept if number_of(each.record, self.unit) is None]
        here = f"no {self.unit} is recorded in {ends([escaped(each.path.name) for each in without])}"
        if without and len(without) == len(kept):
            other: Unit = "epoch" if self.unit == "step" else "step"
            has_other = all(number_of(each.record, other) is not None for each in kept)
            advice = f"Name the column of the {other}s" if has_other else "Use --last or --include instead"
            raise IncompatibleError(f"{setting('--log-step', self.step.given)}: {here}. {advice}.")
        if without:
            notice(f"skipped, because {here}")
        return [each for each in kept if each not in without]

    def _refuse_repeated(self, candidates: Sequence[Candidate]) -> None:
        seen: dict[int | None, Candidate] = {}
        for each in candidates:
            number = number_of(each.record, self.unit)
            if number in seen:
                names = f"{escaped(seen[number].path.name)} and {escaped(each.path.name)}"
                raise IncompatibleError(
                    f"{setting('--log-step', self.step.given)}: {names} have the same {self.unit}, {number}, so a row "
                    f"does not tell which of them it is about. Name a column that does, or add "
                    f"{setting('--exclude', each.path.name)}."
                )
            seen[number] = each

    def _tell_lacking(
        self, kept: Sequence[Candidate], lacking: Sequence[Candidate], metric: str, notice: Notice
    ) -> None:
        """Tells for which checkpoints nothing is logged.

        Raises:
            IncompatibleError: nothing is logged for any, or something for all if the log counts otherwise: then the
                rows may be those of other checkpoints.
        """
        if not lacking:
            return
        is_all = len(lacking) == len(kept)
        here = f"{escaped(self.path.name)} has no {quote(metric)} at {self._steps_of(lacking)}"
        logged = _steps_in(self.path, self.step, metric)
        hint = other_reading(self.step, self.unit, [each.record for each in kept], logged, is_all=is_all)
        if not is_all and not hint:
            notice(f"skipped, because {here}: {ends([escaped(each.path.name) for each in lacking])}")
            return
        extent = f"only at {min(logged)} to {max(logged)}" if logged else "nor at any other"
        advice = hint or "Name another column with --log-step, or the log of this run."
        if not is_all:
            advice += f" Otherwise add {excluding(lacking)}."
        raise IncompatibleError(f"{setting('--log-step', self.step.given)}: {here}, {extent}. {advice}")


def read_log(candidates: Sequence[Candidate], options: LogOptions, notice: Notice) -> MetricLog:
    """Reads from a log what it says of checkpoints.

    Raises:
        UsageError: there is no such file.
        CheckpointFormatError: it cannot be read, or is no log.
        IncompatibleError: it does not tell the steps of its rows.
    """
    path = _path(options.log or "")
    step = StepColumn.parse("step" if options.log_step is None else options.log_step)
    records = [each.record for each in candidates]
    unit = _unit(step, records, notice)
    numbered = [each for each in candidates if each.record.is_lone_number]
    if lone := [each for each in numbered if unit == "step" or each.record.epoch is None]:
        names = ends([escaped(each.path.name) for each in lone])
        notice(f"{setting('--log-step', step.given)}: the numbers in the names of {names} are taken for {unit}s")
    found: dict[int | None, dict[str, Logged]] = {number_of(record, unit): {} for record in records}
    found.pop(None, None)
    columns: dict[str, None] = {}
    for row in read_rows(path, notice):
        if not columns.keys() >= row.cells.keys() and len(columns) < LIMITS.log_columns:
            columns.update(dict.fromkeys(row.cells))
        at = found.get(step.number(row.cells))
        if at is not None:
            for name, cell in row.cells.items():
                if not _is_nothing(cell):
                    at[name] = Logged(cell, row.where, _earlier(at.get(name), cell))
    if not columns:
        raise IncompatibleError(f"{path}: has no rows. Wait until the trainer has logged one, or name another log.")
    own = step.given if step.given in columns else step.name
    if own not in columns:
        raise IncompatibleError(
            f"{setting('--log-step', step.given)}: {escaped(path.name)} has {listing(map(quote, columns))}."
            f"{suggestion(step.name, columns) or ' Name the column of the steps or epochs.'}"
        )
    for at in found.values():
        at.pop(own, None)
    return MetricLog(
        path, step, unit, [name for name in columns if name != own], {number or 0: at for number, at in found.items()}
    )


def _path(given: str | os.PathLike[str]) -> Path:
    try:
        mode = os.stat(given).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{setting('--log', given)}: {missing(given, 'no such file')}") from error
    except (OSError, ValueError) as error:  # no permission, a name too long or with NUL
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--log {quote(given)}: cannot be accessed: {why}. Check the path.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise UsageError(f"{setting('--log', given)}: expected a file, got {kind}. Name a log in CSV or JSON lines.")
    return Path(given)


def _unit(step: StepColumn, records: Sequence[Record], notice: Notice) -> Unit:
    if step.unit == "epoch":
        return "epoch"
    if step.unit is None and all(each.step is None for each in records):
        notice(f"{setting('--log-step', step.given)}: the checkpoints record no steps, so these are epochs")
        return "epoch"
    if all(each.step is not None for each in records) and unit_of(records) == "epoch":
        raise IncompatibleError(
            f"{setting('--log-step', step.given)}: the steps of the checkpoints start again in each epoch, so they do "
            f"not tell which checkpoint a row is about. Name the column of the epochs, for example "
            f"{setting('--log-step', 'epoch')}."
        )
    return "step"


def _earlier(before: Logged | None, cell: object) -> Logged | None:
    """Returns the value that a cell replaces, if that is another one."""
    if before is None or before.cell == cell or before.value == Logged(cell, "").value is not None:
        return before and before.earlier
    return Logged(before.cell, before.where)


def _is_nothing(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and cell.strip().lower() in _NOTHING)


def _steps_in(path: Path, step: StepColumn, metric: str) -> set[int]:
    """Returns the steps at which a metric is logged; of very many the first."""
    rows = (row for row in read_rows(path, lambda _: None) if not _is_nothing(row.cells.get(metric)))
    numbers = (number for row in rows if (number := step.number(row.cells)) is not None)
    return set(itertools.islice(numbers, LIMITS.log_steps))
