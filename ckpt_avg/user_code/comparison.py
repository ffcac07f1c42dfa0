"""What was measured of several weights, and how they differ: better, worse, or within the spread of the repeats."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_avg.results import Result, numbers
from ckpt_avg.text import escaped, listing

# Words of a metric's name that tell its direction. Names with words of both kinds, or of none, do not; nor do names
# that may mean the opposite: neg_loss, 1-acc, error_reduction.
_HIGHER = (
    r"acc\d*|accuracy|top\d+|precision|recall|f1|auc|auroc|auprc|map\d*|m?iou|dice|jaccard|mcc|kappa|ndcg|mrr|bleu|rouge|"
    r"chrf|meteor|psnr|ssim|r2"
)
_LOWER = (
    r"loss|losses|error|err|nll|bce|xent|perplexity|ppl|bpb|bpc|wer|cer|mae|r?mse|mape|fid|kid|eer|lpips|brier|cost"
)
_OPPOSITE = (
    r"neg|negative|minus|inv|inverse|reciprocal|complement|one|no|non|not|without|free|improvement|reduction|gain|drop|"
    r"decrease|increase|delta|diff|difference|change|saved"
)
_SIGN = r"(^|(?<![a-z0-9])1)\s*[-−/]\s*[a-z]"


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Result):
    """What the user's functions measured for one set of weights.

    Attributes:
        name: what the weights are called.
        path: the checkpoint; None for an average.
        metrics: name → number, the mean if it was measured several times.
        refreshed: whether the BatchNorm statistics were recomputed for these weights.
        samples: name → each number, in the order of repeats and functions, if there are several.
    """

    name: str
    path: Path | None
    metrics: Mapping[str, float]
    refreshed: bool = False
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def _title(self) -> str:
        return f"{self.name}: {numbers(self.metrics)}"


@dataclass(frozen=True, slots=True, repr=False)
class Change(Result):
    """How one metric differs between two sets of weights.

    Attributes:
        metric: its name.
        difference: of its values, the mean over the repeats.
        spread: the standard deviation of the difference over the repeats, which have the same random states on both
            sides; None if there is only one.
        verdict: ``better``, ``worse``, ``equal``, ``within the spread`` or ``not a number``; empty if the metric's
            direction is unknown.
    """

    metric: str
    difference: float
    spread: float | None
    verdict: str

    def _title(self) -> str:
        return " ".join(filter(None, (self.metric, f"{self.difference:+.6g}", self.verdict)))


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Result):
    """What averaging added, and what the refresh of the statistics added.

    Attributes:
        averaging: from the last checkpoint, with its statistics refreshed if those of the average are, to the average.
            Empty if there is only one checkpoint.
        refresh: from these weights as they were saved to the same with refreshed statistics. For an average the last
            checkpoint shows it. Empty without a refresh.
    """

    averaging: tuple[Change, ...]
    refresh: tuple[Change, ...]

    def _title(self) -> str:
        return "what averaging changed" + (", and the refresh" if self.refresh else "")

    def _facts(self) -> Iterator[tuple[str, str]]:
        for name, changes in (("averaging", self.averaging), ("refresh", self.refresh)):
            yield name, ", ".join(each._title() for each in changes)


def mean_of(numbers: Sequence[float]) -> float:
    """Returns the arithmetic mean, rounded once: that of equal numbers is the same. Infinities and NaN are allowed."""
    import statistics  # not for --help

    return statistics.mean(numbers)


def spread_of(numbers: Sequence[float]) -> float | None:
    """Returns the sample standard deviation of several numbers."""
    if len(numbers) < 2:
        return None
    mean = mean_of(numbers)
    return math.sqrt(sum((number - mean) * (number - mean) for number in numbers) / (len(numbers) - 1))


def compare(before: Evaluation, after: Evaluation, directions: Mapping[str, bool]) -> tuple[Change, ...]:
    """Returns how each metric differs. ``directions`` says for which metrics higher is better, or lower."""
    changes = []
    for metric, value in before.metrics.items():
        pairs = zip(before.samples.get(metric, ()), after.samples.get(metric, ()), strict=True)
        differences = [other - one for one, other in pairs]
        difference = mean_of(differences) if differences else after.metrics[metric] - value
        spread = spread_of(differences)
        higher = directions.get(metric, higher_is_better(metric))
        changes.append(Change(metric, difference, spread, _verdict(difference, spread, higher)))
    return tuple(changes)


def higher_is_better(metric: str) -> bool | None:
    """Whether higher values are better, by the words of a metric's name; None if they do not tell."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", " ", metric).lower()
    words = re.findall(r"[a-z0-9]+", re.sub(r"\btop[-_ @]?(\d+)", r"top\1", name))
    higher, lower, opposite = (
        any(re.fullmatch(known, word) for word in words) for known in (_HIGHER, _LOWER, _OPPOSITE)
    )
    return None if higher == lower or opposite or re.search(_SIGN, name) else higher


def helped(changes: Sequence[Change]) -> bool | None:
    """Whether some metric got better and none worse; None if that cannot be said with one word."""
    verdicts = {change.verdict for change in changes} - {"not a number"}
    if "better" in verdicts:
        return None if "worse" in verdicts else True
    return False if verdicts and "" not in verdicts else None


def summary(comparison: Comparison | None) -> str:
    """Says in one sentence what averaging changed, and what the refresh changed; empty if nothing was compared."""
    parts = {} if comparison is None else {"averaging": comparison.averaging, "the refresh": comparison.refresh}
    return "; ".join(_changes(what, changes) for what, changes in parts.items() if changes)


def _changes(what: str, changes: Sequence[Change]) -> str:
    helps = {True: " helped", False: " did not help", None: ""}[helped(changes)]
    shown = listing(
        f"{escaped(change.metric)} cannot be compared ({change.verdict})"
        if math.isnan(change.difference)
        else f"{escaped(change.metric)} {difference_text(change.difference, change.spread)}"
        + (f" ({change.verdict})" if change.verdict else "")
        for change in changes
    )
    return f"{what}{helps}: {shown}"


def difference_text(difference: float, spread: float | None = None) -> str:
    """Returns a difference with its sign, and with its spread if that is known."""
    return f"{difference + 0.0:+.3g}" + ("" if spread is None else f" ±{spread:.2g}")


def _verdict(difference: float, spread: float | None, higher: bool | None) -> str:
    if math.isnan(difference):
        return "not a number"
    if difference == 0:
        return "equal"
    if spread is not None and abs(difference) <= spread:
        return "within the spread"
    if higher is None:
        return ""
    return "better" if (difference > 0) == higher else "worse"
