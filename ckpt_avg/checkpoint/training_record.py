"""What a trainer recorded when it saved a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite

from ckpt_avg.results import Result, numbers


@dataclass(frozen=True, slots=True, repr=False)
class Record(Result):
    """Where in the run a checkpoint was saved, and how good it was.

    Attributes:
        step: optimizer steps (updates, iterations, batches) done.
        epoch: the epoch, as the trainer counts it.
        metrics: the metrics of this checkpoint under the trainer's names; NaN and infinity, too.
        learning_rate: of the first parameter group.
        rates: (step, learning rate) as logged up to this checkpoint, in order; empty if the trainer keeps no log.
        is_lone_number: whether the step is a number in the name that no word explains, so that its unit is unknown.
    """

    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    rates: tuple[tuple[int, float], ...] = ()
    is_lone_number: bool = field(default=False, repr=False)

    def or_else(self, other: Record) -> Record:
        """Returns this record, with missing values filled in from ``other``."""
        return Record(
            self.step if self.step is not None else other.step,
            self.epoch if self.epoch is not None else other.epoch,
            {**other.metrics, **self.metrics},
            self.learning_rate if self.learning_rate is not None else other.learning_rate,
            self.rates or other.rates,
            self.is_lone_number if self.step is not None else other.is_lone_number,
        )

    def _title(self) -> str:
        known = {"step": self.step, "epoch": self.epoch, "learning_rate": self.learning_rate}
        parts = [f"{name} {value}" for name, value in known.items() if value is not None]
        return ", ".join([*parts, numbers(self.metrics)] if self.metrics else parts)


def count(value: object) -> int | None:
    """Returns ``value`` as a step or epoch, or None if it cannot be one."""
    if isinstance(value, float) and isfinite(value) and value == int(value):
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**63 else None


def as_number(value: object) -> float | None:
    """Returns ``value`` as a metric, or None if it is no number. Beyond 2¹⁰⁰⁰ it is infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if abs(value) >= 2.0**1000:
        return inf if value > 0 else -inf
    return float(value)


def measure(value: object) -> float | None:
    """Returns ``value`` as a learning rate, or None if it is not a finite number."""
    number = as_number(value)
    return number if number is not None and isfinite(number) else None


def number_in(text: object) -> float | None:
    """Returns the number that a text, such as the cell of a table, is; None if it is none."""
    try:
        return as_number(float(text)) if isinstance(text, str) and "_" not in text else None  # 1_0 is no 10
    except ValueError:
        return None
