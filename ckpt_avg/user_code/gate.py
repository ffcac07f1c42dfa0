"""``--require 'METRIC>=last'``: a gate that the average must pass before it is published."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_avg.errors import UsageError
from ckpt_avg.text import listing, quote

if TYPE_CHECKING:
    from ckpt_avg.user_code.evaluate import Evaluation

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = re.compile(
    rf"(?P<metric>[^<>=]+?)\s*(?P<operator>>=|<=|>|<)\s*"
    rf"(?:(?P<reference>last|best|mean)\s*(?P<offset>[+-]\s*{_NUMBER})?|(?P<number>[+-]?{_NUMBER}))"
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a metric of the average must be.

    Attributes:
        text: as it was worded.
        metric: the metric's name.
        operator: ``>=``, ``>``, ``<=`` or ``<``.
        reference: ``last``, ``best`` or ``mean`` of the checkpoints; empty for a plain number.
        number: the number, or what is added to the reference.
    """

    text: str
    metric: str
    operator: str
    reference: str
    number: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A requirement, the average's own number, the one that it was held against, and whether it was met."""

    requirement: Requirement
    value: float
    threshold: float
    met: bool

    def __str__(self) -> str:
        short = f"{self.threshold:.6g}", f"{self.value:.6g}"
        # Where six digits don't tell the two apart, all are shown.
        threshold, value = short if short[0] != short[1] else (repr(self.threshold), repr(self.value))
        return f"{self.requirement.text}: expected {self.requirement.operator} {threshold}, got {value}"


def parse_requirement(text: str) -> Requirement:
    """Reads a requirement: a metric, ``>=``, ``>``, ``<=`` or ``<``, and ``last``, ``best``, ``mean`` or a number.

    ``last-0.001`` allows for a difference: the number is added to the reference.

    Raises:
        UsageError: it is worded otherwise.

    Example:
        >>> parse_requirement("accuracy >= last - 0.001").number
        -0.001
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"--require {quote(text)}: expected METRIC>=last, with >=, >, <= or <, and last, best, mean or a number "
            f"behind it, for example 'accuracy>=last' or 'loss<=mean+0.01'. {_advice(text)}"
        )
    number = float("".join((found["number"] or found["offset"] or "0").split()))
    if not math.isfinite(number):
        raise UsageError(f"--require {quote(text)}: expected a number within the range of float64. Use a smaller one.")
    return Requirement(text, found["metric"], found["operator"], found["reference"] or "", number)


def _advice(text: str) -> str:
    if not set(text) & set("<>="):
        return "Put it in quotes: a shell takes < and > for itself, and may have made a file named '=last'."
    if "=>" in text or "=<" in text or "==" in text:
        return "Write >= or <=."
    return "Behind last, best and mean only + or - and a number may stand; a metric's own name holds no <, > or =."


def needs_all(requirements: Sequence[Requirement]) -> bool:
    """Whether every checkpoint must be measured, rather than the last alone."""
    return any(requirement.reference in ("best", "mean") for requirement in requirements)


def refuse_unknown_metrics(requirements: Sequence[Requirement], measured: Evaluation) -> None:
    """Raises UsageError where a requirement names a metric that the function does not return."""
    for requirement in requirements:
        if requirement.metric not in measured.metrics:
            raise UsageError(
                f"--require {quote(requirement.text)}: expected one of the metrics that the --eval function returns "
                f"({listing(map(quote, measured.metrics))}), got {quote(requirement.metric)}."
            )


def mean_of(numbers: Sequence[float]) -> float:
    """Returns the arithmetic mean; infinities and NaN give what IEEE 754 says."""
    total = 0.0
    for number in numbers:  # sum() rounds otherwise from Python 3.12 on
        total += number
    return total / len(numbers)


def outcomes(
    requirements: Sequence[Requirement], average: Evaluation, checkpoints: Sequence[Evaluation]
) -> tuple[Outcome, ...]:
    """Holds the average against each requirement. NaN meets none.

    Args:
        requirements: what must be.
        average: what was measured of the average.
        checkpoints: what was measured of the checkpoints, in their order. ``best`` is the highest of them for ``>=``
            and ``>``, the lowest for ``<=`` and ``<``.
    """
    found = []
    for requirement in requirements:
        measured = [checkpoint.metrics[requirement.metric] for checkpoint in checkpoints]
        if not requirement.reference:
            base = 0.0
        elif requirement.reference == "last":
            base = measured[-1]
        elif requirement.reference == "mean":
            base = mean_of(measured)
        else:
            numbers = [number for number in measured if not math.isnan(number)] or [math.nan]
            base = max(numbers) if requirement.operator.startswith(">") else min(numbers)
        threshold = base + requirement.number
        value = average.metrics[requirement.metric]
        found.append(Outcome(requirement, value, threshold, _OPERATORS[requirement.operator](value, threshold)))
    return tuple(found)
