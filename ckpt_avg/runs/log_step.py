"""`StepColumn`: the column of a log that tells at which step, or in which epoch, each row was logged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_avg.checkpoint.training_record import count, number_in
from ckpt_avg.runs.order import Unit

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


def _count(cell: object) -> int | None:
    return count(number_in(cell) if isinstance(cell, str) else cell)
