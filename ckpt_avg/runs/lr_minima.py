"""The checkpoints at the minima of a cyclical learning rate, as SWA averages them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from ckpt_avg.errors import IncompatibleError
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.order import position, unit_of
from ckpt_avg.text import ends, escaped, listing

_NEAR = 0.05  # of the amplitude: how far the first or last minimum of a run may be from its neighbour
_FAR = 0.25  # of the distance between minima: a checkpoint further from one was not saved at it


def at_lr_minima(kept: list[Candidate], notice: Callable[[str], None]) -> list[Candidate]:
    """Returns the checkpoints at the minima of the learning rate.

    Raises:
        IncompatibleError: the rates are not recorded, or do not fall and rise at least twice.
    """
    option = "--at-lr-minima"
    log = max((candidate.record.rates for candidate in kept), key=len)
    if log and unit_of(each.record for each in kept) == "step":
        found = _nearest(kept, [log[index][0] for index in minima_of([rate for _, rate in log])])
    else:
        lacking = [candidate for candidate in kept if candidate.record.learning_rate is None]
        if lacking:
            names = ends([escaped(each.path.name) for each in lacking])
            raise IncompatibleError(
                f"{option}: expected a learning rate in every checkpoint, got none in {names}. Use --every or "
                "--include instead."
            )
        found = [kept[index] for index in minima_of([candidate.record.learning_rate or 0.0 for candidate in kept])]
    if len(found) < 2:
        rates = [candidate.record.learning_rate for candidate in kept if candidate.record.learning_rate is not None]
        raise IncompatibleError(
            f"{option}: expected a learning rate that falls and rises again at least twice, got "
            f"{ends([f'{rate:g}' for rate in rates])} in the checkpoints. If each was saved at the end of a cycle, "
            "remove the option. Otherwise use --every or --include."
        )
    chosen = [
        f"{escaped(each.path.name)} ({each.record.learning_rate:g})"
        for each in found
        if each.record.learning_rate is not None
    ]
    notice(f"learning rate minima: {listing(chosen)}")
    rates = [each.record.learning_rate or 0.0 for each in kept]
    following = [rates[kept.index(each) + 1] for each in found if kept.index(each) + 1 < len(kept)]
    if not log and following and min(following) >= 0.95 * max(rates):
        notice(
            "each of these is followed by a checkpoint with the highest rate. If the scheduler stepped before the "
            "checkpoint was saved, you may want the next checkpoint instead: use --include or --every"
        )
    return found


def _nearest(kept: list[Candidate], steps: Sequence[int]) -> list[Candidate]:
    """Returns the checkpoint nearest to each step, unless it is far from it."""
    if len(steps) < 2:
        return []
    far = _FAR * min(after - before for before, after in itertools.pairwise(steps))
    chosen = set()
    for step in steps:
        candidate = min(reversed(kept), key=lambda each: abs(position(each.record, "step") - step))
        if abs(position(candidate.record, "step") - step) <= far:
            chosen.add(id(candidate))
    return [candidate for candidate in kept if id(candidate) in chosen]


def minima_of(rates: Sequence[float]) -> list[int]:
    """Returns the indices of the local minima of a series of learning rates.

    SWA with a cyclic rate averages the weights at the end of each cycle, where the rate is lowest (Izmailov et al.
    2018, section 3.2). Equal rates in a row count once, by the last index. The first rate is a minimum only if it is as
    low as the next minimum, within 5 % of the amplitude, because a warmup starts low; the last only if it is no higher
    than the minimum before, because a run may end anywhere.

    Example:
        >>> minima_of([0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1, 0.05])
        [2, 5]
    """
    levels = [list(same)[-1] for _, same in itertools.groupby(enumerate(rates), key=lambda level: level[1])]
    inner = [
        (index, rate)
        for (_, before), (index, rate), (_, after) in zip(levels, levels[1:], levels[2:], strict=False)
        if before > rate < after
    ]
    if not inner:
        return []
    near = _NEAR * (max(rates) - min(rates))
    found = [index for index, _ in inner]
    first, last = levels[0], levels[-1]
    if first[1] < levels[1][1] and abs(first[1] - inner[0][1]) <= near:
        found.insert(0, first[0])
    if last[1] < levels[-2][1] and last[1] <= inner[-1][1] + near:
        found.append(last[0])
    return found
