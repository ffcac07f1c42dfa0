"""Which checkpoints are far off, by their distances, and how that is told from an ordinary run.

Three rules, each with a threshold that ordinary training stays below (docs/comparing.md has the reasons):

1. `unrelated`: the cosine to the others is at most `UNRELATED`, so they are as far apart as from zero.
2. `detours`: a checkpoint is far from the ones before and after it, which are close to each other.
3. `jumps`: one step is far longer than all steps before and after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_avg.mean.geometry import Matrix  # which imports torch

UNRELATED = 0.5  # cosine: at equal norms, the distance is then the norm
# Of the way through a checkpoint to the direct one. A straight path has 1, a random walk √2, noise around one point 2,
# and noise that grows or shrinks at most 1 + √2.
DETOUR = 4.0
JUMP = 3.0  # of a step to each other step, if that is as long as the longer time allows
# Of a tensor to its mean: as above, where all other checkpoints are clearly related.
RELATED = 0.75
LEAST_WEIGHTS = 100  # distances of fewer random numbers vary too much to tell
_MOST_TOGETHER = 10  # checkpoints on one detour
_LEAST_DISTANCE = 1e-4  # of the norm: less does not matter to an average


@dataclass(frozen=True, slots=True)
class Detour:
    """Neighbours that are far off: the way through each of them is at least ``factor`` times the direct one."""

    members: tuple[int, ...]
    before: int
    after: int
    factor: float


@dataclass(frozen=True, slots=True)
class Jump:
    """A step from one checkpoint to the next that is at least ``factor`` times as long as each other step."""

    before: int
    after: int
    factor: float


def related_groups(cosines: Matrix, chosen: Sequence[int]) -> list[list[int]]:
    """Returns the chosen checkpoints in groups, the largest first; of equals the one with the later checkpoints.

    Two whose cosine is above `UNRELATED` are in one group, so a run that has gone far, step by step, is one.
    """
    groups: list[list[int]] = []
    for index in chosen:
        near = [group for group in groups if any(cosines[index][other] > UNRELATED for other in group)]
        groups = [group for group in groups if group not in near] + [sorted([index, *itertools.chain(*near)])]
    return sorted(groups, key=lambda group: (len(group), group[-1]), reverse=True)


def detours(distances: Matrix, norm: float, chosen: Sequence[int]) -> Iterator[Detour]:
    """Yields the checkpoints that are off the path of the others, the farthest first; each is then left out.

    Up to a third of the checkpoints, and at most ten, can be off together.
    """
    left = list(chosen)
    while found := max(_detours(distances, norm, left), key=lambda each: each.factor, default=None):
        yield found
        left = [index for index in left if index not in found.members]


def _detours(distances: Matrix, norm: float, path: Sequence[int]) -> Iterator[Detour]:
    for length in range(1, min(max(1, len(path) // 3), _MOST_TOGETHER) + 1):
        for start in range(1, len(path) - length):
            before, *members, after = path[start - 1 : start + length + 1]
            direct = max(distances[before][after], _LEAST_DISTANCE * norm)
            if not direct:  # the same checkpoint before and after, and a mean of zero: there is no scale
                continue
            factor = min((distances[before][each] + distances[each][after]) / direct for each in members)
            if factor >= DETOUR:
                yield Detour(tuple(members), before, after, factor)


def jump(distances: Matrix, norm: float, chosen: Sequence[int], positions: Sequence[int]) -> Jump | None:
    """Returns the step that is far longer than every other, if there is one.

    A step may be longer than another by the ratio of their times, as on a straight path. The first may be longer than
    all others, as while the learning rate falls.

    Args:
        distances: between each two checkpoints.
        norm: of the mean.
        chosen: the checkpoints, in order.
        positions: when each of all checkpoints was saved: ascending.
    """
    steps = list(itertools.pairwise(chosen))
    if len(steps) < 3:
        return None
    lengths = [max(distances[before][after], _LEAST_DISTANCE * norm) for before, after in steps]
    if not all(lengths):
        return None
    times = [max(1, positions[after] - positions[before]) for before, after in steps]
    longest = max(range(len(steps)), key=lengths.__getitem__)
    others = (each for each in range(len(steps)) if each != longest)
    factor = min(lengths[longest] / lengths[each] / max(1.0, times[longest] / times[each]) for each in others)
    return Jump(*steps[longest], factor) if longest > 0 and factor >= JUMP else None
