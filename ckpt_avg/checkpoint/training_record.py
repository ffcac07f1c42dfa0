"""What a trainer recorded of the moment at which a checkpoint was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite


@dataclass(frozen=True, slots=True)
class Record:
    """Where in the run a checkpoint lies, and how good it was.

    Attributes:
        step: optimizer steps (updates, iterations, batches) done.
        epoch: the epoch, as the trainer counts it.
        metrics: what was measured at this checkpoint, by the trainer's names; finite values only.
        learning_rate: of the first parameter group, as saved.
        rates: (step, learning rate) as logged over the run up to this checkpoint, in order; empty where the
            trainer keeps no log.
    """

    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    rates: tuple[tuple[int, float], ...] = ()

    def or_else(self, other: Record) -> Record:
        """Returns this record, what it leaves open taken from ``other``."""
        return Record(
            self.step if self.step is not None else other.step,
            self.epoch if self.epoch is not None else other.epoch,
            {**other.metrics, **self.metrics},
            self.learning_rate if self.learning_rate is not None else other.learning_rate,
            self.rates or other.rates,
        )


def count(value: object) -> int | None:
    """Returns a step or epoch, or None where ``value`` cannot be one."""
    if isinstance(value, float) and isfinite(value) and value == int(value):
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**63 else None


def measure(value: object) -> float | None:
    """Returns a metric or a rate, or None where ``value`` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= 2.0**1000:
        return None
    return float(value) if isfinite(value) else None
