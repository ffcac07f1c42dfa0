"""Which of the candidates to average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.runs.candidates import Candidate, Unit, position, unit_of
from ckpt_avg.runs.cycles import bottoms
from ckpt_avg.text import listing, plural, quote

_MODES = ("min", "max")
_FAR = 0.25  # of the distance between bottoms: a checkpoint further away from one was not saved at it


@dataclass(frozen=True, slots=True)
class Selection:
    """What to take. The rules apply in this order.

    Attributes:
        include: glob patterns for file names; a checkpoint that matches none is left out.
        exclude: glob patterns for file names; a checkpoint that matches one is left out.
        from_step: steps, or epochs where the run records no steps: earlier checkpoints are left out.
        to_step: the same: later ones are left out.
        at_lr_minima: only those at the bottom of a cycle of the learning rate.
        every: of what is left, each K-th, counted back from the last, which is always taken.
        last: of what is left, the last N.
        best: of what is left, the N best by ``metric``, in their order.
        metric: the name of a recorded metric; may be left out where only one is recorded.
        mode: ``min`` or ``max``: which is better.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    from_step: int | None = None
    to_step: int | None = None
    at_lr_minima: bool = False
    every: int | None = None
    last: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: str | None = None

    def wants(self, name: str) -> bool:
        """Whether ``include`` and ``exclude`` let a file name through."""
        return (not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)) and not any(
            fnmatchcase(name, pattern) for pattern in self.exclude
        )


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """Returns glob patterns as a tuple; a single one may be given as it is."""
    return (given,) if isinstance(given, str) else tuple(given)


def check_selection(selection: Selection) -> Selection:
    """Returns the selection; raises UsageError where the rules make no sense as they are worded."""
    for option, number in (("--last", selection.last), ("--every", selection.every), ("--best", selection.best)):
        if number is not None and number < 1:
            raise UsageError(f"{option}: expected 1 or more, got {number}.")
    if selection.best is None:
        for option, given in (("--metric", selection.metric), ("--mode", selection.mode)):
            if given is not None:
                raise UsageError(f"{option} {given}: says what is best, but nothing asks for the best. Add --best N.")
    elif selection.mode not in _MODES:
        got = "nothing" if selection.mode is None else repr(selection.mode)
        raise UsageError(
            f"--best {selection.best}: expected --mode min (a loss, an error rate) or --mode max (an accuracy), got "
            f"{got}."
        )
    if selection.from_step is not None and selection.to_step is not None and selection.from_step > selection.to_step:
        raise UsageError(
            f"--from-step {selection.from_step} lies behind --to-step {selection.to_step}: expected it before."
        )
    return selection


def select(
    candidates: Sequence[Candidate], selection: Selection, notice: Callable[[str], None] = lambda text: None
) -> tuple[Candidate, ...]:
    """Applies a selection to candidates in order; ``include`` and ``exclude`` have been applied to their names.

    Raises:
        UsageError: the selection makes no sense.
        IncompatibleError: nothing is left, fewer than are asked for, or the run does not record what a rule needs.
    """
    check_selection(selection)
    kept = list(candidates)
    if selection.from_step is not None or selection.to_step is not None:
        kept = _between(kept, selection, notice)
    if selection.at_lr_minima:
        kept = _at_minima(kept, notice)
    if selection.every is not None:
        kept = kept[::-1][:: selection.every][::-1]
    if selection.last is not None:
        kept = _enough(kept, selection.last, "--last")[-selection.last :]
    if selection.best is not None:
        kept = _best(kept, selection.best, selection.metric, selection.mode == "max", notice)
    return tuple(kept)


def _names(candidates: Sequence[Candidate]) -> str:
    return listing(quote(candidate.path.name)[1:-1] for candidate in candidates)


def _enough(kept: list[Candidate], number: int, option: str) -> list[Candidate]:
    if len(kept) < number:
        raise IncompatibleError(
            f"{option} {number}: expected at least that many checkpoints, got {len(kept)} ({_names(kept)}). "
            f"Ask for {option} {len(kept)} or name more."
        )
    return kept


def _unit(candidates: Sequence[Candidate], option: str) -> Unit:
    unit = unit_of(candidates)
    if unit is None:
        lacking = [candidate for candidate in candidates if candidate.record.step is None]
        if not [each for each in lacking if each.record.epoch is None]:
            raise IncompatibleError(
                f"{option}: expected steps for every checkpoint, or epochs, got only epochs for {_names(lacking)} and "
                "only steps for others. Choose with --include and --exclude."
            )
        raise IncompatibleError(
            f"{option}: expected a step or an epoch for every checkpoint, got none for {_names(lacking)}. Leave these "
            "out with --exclude, or choose with --include."
        )
    return unit


def _between(kept: list[Candidate], selection: Selection, notice: Callable[[str], None]) -> list[Candidate]:
    unit = _unit(kept, "--from-step" if selection.from_step is not None else "--to-step")
    first = selection.from_step if selection.from_step is not None else 0
    found = [
        candidate
        for candidate in kept
        if first <= position(candidate, unit)
        and (selection.to_step is None or position(candidate, unit) <= selection.to_step)
    ]
    last = selection.to_step if selection.to_step is not None else "…"
    if not found:
        positions = [position(candidate, unit) for candidate in kept]
        raise IncompatibleError(
            f"nothing to average: none of {plural(len(kept), 'checkpoint')} lies in {unit}s {first} to {last}; they "
            f"lie in {min(positions)} to {max(positions)}. Change --from-step or --to-step."
        )
    if unit == "epoch":
        notice(f"the run records no steps, so {first} to {last} are epochs")
    return found


def _best(
    kept: list[Candidate], number: int, metric: str | None, highest: bool, notice: Callable[[str], None]
) -> list[Candidate]:
    recorded = sorted({name for candidate in kept for name in candidate.record.metrics})
    if metric is None and len(recorded) == 1:
        metric = recorded[0]
    if metric not in recorded:
        wanted = "a name for --metric" if metric is None else f"--metric {metric}"
        found = listing(map(quote, recorded)) if recorded else "no metric at all"
        advice = "Name one of these." if recorded else "Choose with --include or --last instead."
        raise IncompatibleError(f"--best {number}: expected {wanted}, got checkpoints that record {found}. {advice}")
    measured = [candidate for candidate in kept if metric in candidate.record.metrics]
    if len(measured) < len(kept):
        lacking = [candidate for candidate in kept if metric not in candidate.record.metrics]
        notice(f"left out, since they record no {quote(metric)}: {_names(lacking)}")
    _enough(measured, number, "--best")
    sign = -1.0 if highest else 1.0
    # sorted keeps the order of equals, so of these the later one is taken.
    newest_first = measured[::-1]
    ranked = sorted(newest_first, key=lambda candidate: sign * candidate.record.metrics[metric])
    chosen = {id(candidate) for candidate in ranked[:number]}
    return [candidate for candidate in kept if id(candidate) in chosen]


def _at_minima(kept: list[Candidate], notice: Callable[[str], None]) -> list[Candidate]:
    option = "--at-lr-minima"
    unit = unit_of(kept)
    log = max((candidate.record.rates for candidate in kept), key=len)
    if log and unit == "step":
        steps = [log[index][0] for index in bottoms([rate for _, rate in log])]
        found = _nearest(kept, steps)
    else:
        lacking = [candidate for candidate in kept if candidate.record.learning_rate is None]
        if lacking:
            raise IncompatibleError(
                f"{option}: expected a learning rate in every checkpoint, got none in {_names(lacking)}. Choose with "
                "--every or --include instead."
            )
        found = [kept[index] for index in bottoms([candidate.record.learning_rate or 0.0 for candidate in kept])]
    if len(found) < 2:
        rates = [candidate.record.learning_rate for candidate in kept if candidate.record.learning_rate is not None]
        shown = listing(f"{rate:g}" for rate in rates)
        raise IncompatibleError(
            f"{option}: expected a learning rate that falls and rises again at least twice, got {shown} in the "
            "checkpoints. If each was saved at the end of a cycle, leave the option out; else choose with --every or "
            "--include."
        )
    chosen = [
        f"{quote(each.path.name)[1:-1]} ({each.record.learning_rate:g})"
        for each in found
        if each.record.learning_rate is not None
    ]
    notice(f"at the bottom of the learning rate's cycles: {listing(chosen)}")
    rates = [each.record.learning_rate or 0.0 for each in kept]
    behind = [rates[kept.index(each) + 1] for each in found if kept.index(each) + 1 < len(kept)]
    if not log and behind and min(behind) >= 0.95 * max(rates):
        notice(
            "each is followed by a checkpoint that records the highest rate: if the scheduler stepped before the "
            "checkpoint was saved, those are the ends of the cycles; choose them with --include or --every"
        )
    return found


def _nearest(kept: list[Candidate], steps: Sequence[int]) -> list[Candidate]:
    """Returns the checkpoint nearest to each step, unless it is far from it."""
    if len(steps) < 2:
        return []
    far = _FAR * min(after - before for before, after in itertools.pairwise(steps))
    chosen = set()
    for step in steps:
        candidate = min(reversed(kept), key=lambda each: abs(position(each, "step") - step))
        if abs(position(candidate, "step") - step) <= far:
            chosen.add(id(candidate))
    return [candidate for candidate in kept if id(candidate) in chosen]
