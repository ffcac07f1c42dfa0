"""At which step, or in which epoch, a row of a log was logged, and which checkpoint that is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_avg.checkpoint.training_record import Record, count, number_in
from ckpt_avg.runs.order import Unit
from ckpt_avg.wording import setting

_EPOCH = re.compile(r"(?<![A-Za-z])(?<!in[-_/ .])epoch", re.IGNORECASE)  # current_epoch, but not step_in_epoch


@dataclass(frozen=True, slots=True)
class StepColumn:
    """Where a log tells the step of a row: ``[step=|epoch=]COLUMN[+N|-N]``, or a column that has this whole name.

    Attributes:
        given: the text.
        name: the column.
        shift: what is added to its numbers.
        unit: what they count; None if that is not said.
    """

    given: str
    name: str
    shift: int
    unit: Unit | None

    @classmethod
    def parse(cls, given: str) -> StepColumn:
        """Returns what a text says."""
        match = re.fullmatch(r"(?:(step|epoch)=)?(.+?)([+-]\d{1,18})?", given, re.DOTALL)
        said, name, shift = match.groups() if match else (None, given, None)
        unit: Unit | None = "epoch" if said == "epoch" or (not said and _EPOCH.search(name)) else None
        return cls(given, name, int(shift or 0), "step" if said == "step" else unit)

    def number(self, cells: Mapping[str, object]) -> int | None:
        """Returns the step of a row; None if it has none."""
        if self.given in cells:
            return _count(cells[self.given])
        number = _count(cells.get(self.name))
        return None if number is None else number + self.shift

    def later(self, steps: int) -> str:
        """Returns the text for numbers that are higher by ``steps``."""
        shift = self.shift + steps
        said = self.given.partition(self.name)[0]
        return f"{said}{self.name}{shift:+d}" if shift else said + self.name


def number_of(record: Record, unit: Unit) -> int | None:
    """Returns what a row must have to be about a checkpoint. A number whose unit is unknown counts for both."""
    if unit == "epoch" and record.epoch is not None:
        return record.epoch
    return record.step if unit == "step" or record.is_lone_number else None


def other_reading(step: StepColumn, unit: Unit, records: Sequence[Record], logged: set[int], *, is_all: bool) -> str:
    """Says how a log may count otherwise, so that every checkpoint has a row; empty if that is not found.

    Args:
        step: where the log tells the steps.
        unit: what they count.
        records: those of the checkpoints; each has such a number.
        logged: the steps of the log.
        is_all: whether no checkpoint has a row. Otherwise only neighbouring numbers are tried.
    """
    numbers = [number_of(each, unit) or 0 for each in records]
    shifts = sorted((numbers[0] - each for each in logged), key=abs) if len(numbers) > 1 and is_all else (1, -1)
    for shift in shifts:
        if all(number - shift in logged for number in numbers):
            return (
                f"With {setting('--log-step', step.later(shift))} every checkpoint has a row: use it if the log counts "
                f"{abs(shift):,} {'lower' if shift > 0 else 'higher'}."
            )
    other: Unit = "epoch" if unit == "step" else "step"
    if all(number_of(each, other) in logged for each in records):
        return f"The {other}s of the checkpoints are there: use {setting('--log-step', f'{other}={step.name}')}."
    return ""


def _count(cell: object) -> int | None:
    return count(number_in(cell) if isinstance(cell, str) else cell)
