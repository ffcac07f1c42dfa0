"""``--require 'METRIC>=last'``: conditions that the average must meet to be published."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckpt_avg.errors import UsageError
from ckpt_avg.text import listing, quote, suggestion
from ckpt_avg.user_code.comparison import Evaluation, mean_of
from ckpt_avg.wording import either

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = re.compile(
    rf"(?P<metric>[^<>=]+?)\s*(?P<operator>>=|<=|>|<)\s*"
    rf"(?:(?P<reference>last-saved|last|best|mean)\s*(?P<offset>[+-]\s*{_NUMBER})?|(?P<number>[+-]?{_NUMBER}))"
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """A condition on one metric of the average.

    Attributes:
        text: as the user wrote it.
        metric: the metric's name.
        operator: ``>=``, ``>``, ``<=`` or ``<``.
        reference: ``last``, ``last-saved``, ``best`` or ``mean`` of the checkpoints; empty for a plain number.
        number: the number, or what is added to the reference.
    """

    text: str
    metric: str
    operator: str
    reference: str
    number: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A requirement, the value of the average, the threshold that it was compared with, and whether it was met."""

    requirement: Requirement
    value: float
    threshold: float
    met: bool

    def __str__(self) -> str:
        short = f"{self.threshold:.6g}", f"{self.value:.6g}"
        # All digits if six are not enough to tell the two apart.
        threshold, value = short if short[0] != short[1] else (repr(self.threshold), repr(self.value))
        return f"{self.requirement.text}: expected {self.requirement.operator} {threshold}, got {value}"


def parse_requirement(text: str) -> Requirement:
    """Parses a requirement: a metric, ``>=``, ``>``, ``<=`` or ``<``, and a reference or a number.

    A number may be added to the reference: ``last-0.001`` allows for a small loss.

    Raises:
        UsageError: the text has another form.

    Example:
        >>> parse_requirement("accuracy >= last - 0.001").number
        -0.001
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"--require {quote(text)}: expected a metric, then >=, >, <= or <, then last, last-saved, best, mean or a "
            f"number, for example 'accuracy>=last' or 'loss<=mean+0.01'. {_advice(text)}"
        )
    number = float("".join((found["number"] or found["offset"] or "0").split()))
    if not math.isfinite(number):
        raise UsageError(f"--require {quote(text)}: the number exceeds the range of float64. Use a smaller one.")
    return Requirement(text, found["metric"], found["operator"], found["reference"] or "", number)


def _advice(text: str) -> str:
    if not set(text) & set("<>="):
        quotes = "Put it in quotes: otherwise the shell redirects to a file named '=last', which may exist now."
        return either(quotes, "Write one of these signs.")
    if "=>" in text or "=<" in text or "==" in text:
        return "Write >= or <=."
    return "After a reference only +NUMBER or -NUMBER is allowed; a metric name cannot contain <, > or =."


def needs_all(requirements: Sequence[Requirement]) -> bool:
    """Whether every checkpoint must be measured, not only the last."""
    return any(requirement.reference in ("best", "mean") for requirement in requirements)


def refuse_unknown_metrics(requirements: Sequence[Requirement], measured: Evaluation) -> None:
    """Raises UsageError if a requirement names a metric that the function does not return."""
    for requirement in requirements:
        if requirement.metric not in measured.metrics:
            raise UsageError(
                f"--require {quote(requirement.text)}: the --eval function returns no {quote(requirement.metric)}. It "
                f"returns {listing(map(quote, measured.metrics))}.{suggestion(requirement.metric, measured.metrics)}"
            )


def outcomes(
    requirements: Sequence[Requirement], average: Evaluation, checkpoints: Sequence[Evaluation], saved: Evaluation
) -> tuple[Outcome, ...]:
    """Compares the average with each requirement. NaN meets none.

    ``best`` is the highest value of the checkpoints for ``>=`` and ``>``, and the lowest for ``<=`` and ``<``.
    ``checkpoints`` ends with the last one; ``saved`` is the last one as it was saved.
    """
    found = []
    for requirement in requirements:
        measured = [checkpoint.metrics[requirement.metric] for checkpoint in checkpoints]
        if not requirement.reference:
            base = 0.0
        elif requirement.reference == "last":
            base = measured[-1]
        elif requirement.reference == "last-saved":
            base = saved.metrics[requirement.metric]
        elif requirement.reference == "mean":
            base = mean_of(measured)
        else:
            numbers = [number for number in measured if not math.isnan(number)] or [math.nan]
            base = max(numbers) if requirement.operator.startswith(">") else min(numbers)
        threshold = base + requirement.number
        value = average.metrics[requirement.metric]
        found.append(Outcome(requirement, value, threshold, _OPERATORS[requirement.operator](value, threshold)))
    return tuple(found)
