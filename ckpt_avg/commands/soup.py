"""`soup`: the greedy soup, the mean of the checkpoints that a metric keeps.

The recipe is that of Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time" (arXiv 2203.05482), recipe 1: sort by the metric, then add one after the
other, and keep it if the metric of the average gets no worse.

Each candidate is summed from its checkpoints in their order, as `average` does: a sum that later ones are added to
would round differently. To read less, several decisions are prepared in one pass over the checkpoints.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ckpt_avg.choices import BestMode
from ckpt_avg.commands.average import check_paths, write_average
from ckpt_avg.commands.averages import Averages, at_once
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.draft import AverageResult
from ckpt_avg.commands.prepare import prepare
from ckpt_avg.commands.requests import SoupRequest, takes
from ckpt_avg.commands.resume import LAST, Measurements, check_resume, key_of
from ckpt_avg.errors import IncompatibleError, RequirementError, UserCodeError
from ckpt_avg.mean.memory_output import MemoryOutput
from ckpt_avg.progress import Phase
from ckpt_avg.results import Result, Rows, counted, notices_counted, numbers, paths_counted
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import distinct_names, escaped, listing, plural, quote
from ckpt_avg.user_code.comparison import Evaluation
from ckpt_avg.user_code.gate import refuse_unknown_metrics
from ckpt_avg.wording import setting

_MOST_DECISIONS = 3  # that are prepared in one pass: the averages double with each


@dataclass(frozen=True, slots=True, repr=False)
class Decision(Result):
    """Whether a checkpoint is in the soup.

    Attributes:
        checkpoint: its path.
        metrics, samples: what was measured of it alone, as in `Evaluation`: what `average` makes of it, with its
            statistics refreshed if those of the soup are.
        soup_metrics, soup_samples: what was measured of the soup with it.
        kept: whether it stayed.
    """

    checkpoint: Path
    metrics: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]]
    soup_metrics: Mapping[str, float]
    soup_samples: Mapping[str, tuple[float, ...]]
    kept: bool

    def _title(self) -> str:
        return f"{escaped(self.checkpoint.name)}: {'kept' if self.kept else 'left out'}, {numbers(self.metrics)}"


@dataclass(frozen=True, slots=True, repr=False)
class SoupResult(Result):
    """What `soup` chose and wrote, or with ``dry_run`` would measure.

    Attributes:
        candidates: the checkpoints to choose from, in order.
        skipped: files of run folders that were skipped, with reasons.
        decisions: one for each candidate, the best first, as they were taken; empty for a dry run.
        kept: the checkpoints in the soup, in the order of the sum.
        metric, mode: what decided, and whether ``min`` or ``max`` is better.
        tolerance, split: as given.
        passes: how many times checkpoints were read to measure, or would be: once to measure each alone, then once for
            each few decisions. Writing the output is one more.
        average: the output, as `average` returns it. Its evaluations are the last candidate as it was saved, each
            candidate, and the output; its comparison is with the last candidate. For a dry run it is of all candidates.
        notices: what the user should know.
    """

    candidates: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    decisions: tuple[Decision, ...]
    kept: tuple[Path, ...]
    metric: str
    mode: BestMode
    tolerance: float
    split: str | None
    passes: int
    average: AverageResult
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg soup --json`` prints them, without its ``command``."""
        from ckpt_avg.commands.documents import soup_json

        return soup_json(self)

    def _title(self) -> str:
        return f"{len(self.kept)} of {plural(len(self.candidates), 'checkpoint')} kept, {self.average._title()}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "kept", paths_counted(self.kept)
        yield "candidates", paths_counted(self.candidates)
        yield "metric", f"{escaped(self.metric)}, {self.mode} is better"
        yield "decisions", counted(self.decisions, (each._title() for each in self.decisions[:1]))
        facts = dict(self.average._facts())
        yield "average", facts["comparison"] or facts["output"]
        yield "skipped", paths_counted([each.path for each in self.skipped])
        yield "notices", notices_counted(self.notices)

    def _tables(self) -> Iterator[Rows]:
        header = ("checkpoint", "alone", "soup with it", "kept")
        rows = [
            (each.checkpoint.name, numbers(each.metrics), numbers(each.soup_metrics), "yes" if each.kept else "no")
            for each in self.decisions
        ]
        yield Rows("decisions", header, rows)


@takes(SoupRequest)
def soup(request: SoupRequest) -> SoupResult:
    """Writes the greedy soup of checkpoints: the mean of those that a metric keeps, as `average` writes it.

    Each checkpoint is measured alone. The best is the first in the soup; the others are added in the order of their
    metric, the later checkpoint first of equals, and kept if the metric of the mean gets no worse. Each mean has its
    own refresh. Choose on one split of the data, and report the result on another one.

    Args:
        The fields of `SoupRequest`.

    Returns:
        What was decided and written.

    Raises:
        CkptAvgError: as `average`; IncompatibleError also if there is only one checkpoint, or the metric of one is NaN.
            Of a RequirementError, ``result`` is a `SoupResult`.

    Example:
        >>> import sys
        >>> sys.path.insert(0, "fixtures/mnist_cnn")
        >>> from train import evaluate, make_model
        >>> options = {"evaluate": evaluate, "model": make_model, "bn": "keep", "minimize": "loss"}
        >>> result = soup("fixtures/mnist_cnn", "soup.safetensors", last=3, dry_run=True, **options)
        >>> [path.name for path in result.candidates], result.passes
        (['epoch_18.pt', 'epoch_19.pt', 'epoch_20.pt'], 2)
    """
    with Context(progress=request.callbacks) as context:
        request, chosen = _choose(request, context)
    with Context(progress=request.callbacks) as writing:
        writing.notices += context.notices
        writing.phases_left = context.phases_left

        def result(average: AverageResult) -> SoupResult:
            _notice_other_numbers(chosen, average, request.target[1], writing)
            return SoupResult(
                candidates=chosen.candidates,
                skipped=chosen.skipped,
                decisions=chosen.decisions,
                kept=chosen.kept,
                metric=request.target[1],
                mode="max" if request.maximize is not None else "min",
                tolerance=request.tolerance,
                split=request.split,
                passes=chosen.passes,
                average=average,
                notices=tuple(writing.notices),
            )

        try:
            directions = {request.target[1]: request.maximize is not None}
            return result(write_average(request.as_average(chosen.kept), writing, chosen.measured, directions))
        except RequirementError as error:
            error.result = result(error.result)
            raise


@dataclass(frozen=True, slots=True)
class _Choice:
    """What was chosen, from what.

    Attributes:
        candidates, skipped, decisions, kept, passes: as in `SoupResult`.
        measured: the last candidate as it was saved, if the others are refreshed, and each candidate, in order.
    """

    candidates: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    passes: int
    decisions: tuple[Decision, ...] = ()
    kept: tuple[Path, ...] = ()
    measured: tuple[Evaluation, ...] = ()


def _choose(request: SoupRequest, context: Context) -> tuple[SoupRequest, _Choice]:
    """Measures the checkpoints, then the soups, and takes the decisions; nothing of it for a dry run.

    Returns the request with the user's code, and what was chosen.
    """
    context.phase(Phase("opening checkpoints"))
    discovery = request.discover()
    check_paths(request, discovery, context)
    file = check_resume(request, discovery)
    request, prepared = prepare(discovery, request, context, by_window=True)
    averages = Averages(request, prepared, context)
    decided = min(_MOST_DECISIONS, (at_once(request.hold, prepared) + 1).bit_length() - 1)  # in one pass
    count = len(prepared.checkpoints)
    choice = _Choice(
        candidates=tuple(spec.path for spec in prepared.specs),
        skipped=prepared.selected.skipped,
        passes=1 + -(-(count - 1) // decided),
    )
    if request.dry_run:
        return request, choice
    # What follows, and for the soup: opened, averaged, measured, completed.
    some = (request.sha256, prepared.plan.spectral_norms, prepared.refresh is not None)
    context.phases_left = 3 + 4 + sum(map(bool, some))
    with Measurements("soup", request, prepared, context, averages.meter, file) as kept:
        saved = kept.measure(LAST, lambda: averages.measure_last(request))
        refuse_unknown_metrics(request.requirements, saved)
        context.phase(Phase(f"measuring {count} checkpoints", count, "checkpoints"))
        alone = _measure_alone(averages, kept, choice.candidates, request.target[1])
        context.phase(Phase(f"measuring {plural(count - 1, 'soup')}", count - 1, "soups"))
        decisions, soup = _decide(averages, kept, alone, request, decided)
    averages.meter.notice_chance()
    measured = alone if prepared.refresh is None else [saved, *alone]
    return request, replace(choice, decisions=tuple(decisions), kept=averages.paths(soup), measured=tuple(measured))


def _measure_alone(averages: Averages, kept: Measurements, paths: Sequence[Path], metric: str) -> list[Evaluation]:
    """Returns what was measured of each checkpoint, in order. Raises IncompatibleError if some metric is NaN."""
    alone: list[Evaluation] = []
    names = distinct_names(paths)
    for index, path in enumerate(paths):
        found = kept.measure(key_of((index,)), partial(_alone, averages, names[index], index))
        alone.append(replace(found, name=names[index], path=path))
    unclear = [each for each in alone if math.isnan(each.metrics[metric])]
    if len(unclear) == len(paths):
        raise UserCodeError(f"the --eval function: {quote(metric)} is NaN for every checkpoint. Return a number.")
    if unclear:
        are_unique = len({path.name for path in paths}) == len(paths)
        options = setting("--exclude", *(glob.escape(each.name) for each in unclear[:20]))
        raise IncompatibleError(
            f"{listing(escaped(each.name) for each in unclear)}: the --eval function returns NaN for {quote(metric)}. "
            f"{f'Add {options}' if are_unique else 'Name the other checkpoints'}, or return a number."
        )
    return alone


def _alone(averages: Averages, name: str, index: int) -> Evaluation:
    return averages.measure(name, (index,), *averages.compute([(index,)]))


def _decide(
    averages: Averages, measurements: Measurements, alone: Sequence[Evaluation], request: SoupRequest, together: int
) -> tuple[list[Decision], frozenset[int]]:
    """Returns the decisions, and the indices of the checkpoints in the soup; some decisions share a pass."""

    def value_of(evaluation: Evaluation) -> float:
        return request.sign * evaluation.metrics[request.target[1]]

    order = sorted(range(len(alone)), key=lambda index: (value_of(alone[index]), index), reverse=True)
    kept = frozenset(order[:1])
    best = value_of(alone[order[0]])
    decisions = [_decision(alone[order[0]], alone[order[0]], is_kept=True)]
    for start in range(1, len(order), together):
        following = order[start : start + together]
        outputs: dict[frozenset[int], MemoryOutput] = {}
        for place, index in enumerate(following):
            soup = kept | {index}
            if soup not in outputs and not measurements.has(key_of(soup)):
                soups = possible_soups(kept, following[place:])
                outputs = dict(zip(soups, averages.compute(soups), strict=True))
            measure = partial(_measure_soup, averages, f"the soup with {alone[index].name}", soup, outputs)
            found = measurements.measure(key_of(soup), measure)
            is_kept = value_of(found) >= best - request.tolerance  # not if it is NaN
            decisions.append(_decision(alone[index], found, is_kept=is_kept))
            if is_kept:
                kept, best = soup, max(best, value_of(found))
            for other in [each for each in outputs if (index in each) is not is_kept]:
                del outputs[other]  # frees its memory
    return decisions, kept


def _measure_soup(
    averages: Averages, name: str, soup: frozenset[int], outputs: dict[frozenset[int], MemoryOutput]
) -> Evaluation:
    return averages.measure(name, soup, outputs.pop(soup))


def _decision(alone: Evaluation, soup: Evaluation, *, is_kept: bool) -> Decision:
    return Decision(alone.path or Path(), alone.metrics, alone.samples, soup.metrics, soup.samples, is_kept)


def possible_soups(kept: frozenset[int], following: Sequence[int]) -> list[frozenset[int]]:
    """Returns the soups that the next decisions may have to measure, whatever is kept.

    Example:
        >>> [sorted(soup) for soup in possible_soups(frozenset([5]), [7, 3])]
        [[5, 7], [3, 5], [3, 5, 7]]
    """
    decided, found = [kept], []
    for index in following:
        with_it = [soup | {index} for soup in decided]
        found += with_it
        decided += with_it
    return found


def _notice_other_numbers(chosen: _Choice, average: AverageResult, metric: str, context: Context) -> None:
    """Tells the user if the output does not measure what the soup did when it was chosen."""
    kept = [decision.soup_metrics[metric] for decision in chosen.decisions if decision.kept]
    if kept and average.evaluations and average.evaluations[-1].metrics[metric] != kept[-1]:
        context.notice(
            f"measured once more before it was published, {quote(metric)} of the soup is "
            f"{average.evaluations[-1].metrics[metric]!r}, not {kept[-1]!r}: the loader, the --eval function or the "
            "device gives other numbers each time. --eval-repeats shows how much is chance"
        )
