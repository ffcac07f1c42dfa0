"""Where a cyclical learning rate is at the bottom of its cycles.

SWA with cyclical rates averages the weights at the end of each cycle, where the rate is lowest (Izmailov et al. 2018,
section 3.2, α(i) falls from α₁ to α₂ and starts again).
"""

from __future__ import annotations

from collections.abc import Sequence

_NEAR = 0.05  # of the amplitude: how far a bottom at either end of the run may be from its neighbour


def bottoms(rates: Sequence[float]) -> list[int]:
    """Returns the indices of the local minima of a series of learning rates.

    A run of equal rates counts once, by its last index. The first of the series is a bottom only if it is as low as the
    next one, within 5 % of the amplitude, since a warmup starts low; the last only if it is no higher than that, since
    a run may end anywhere.

    Example:
        >>> bottoms([0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1, 0.05])
        [2, 5]
    """
    levels: list[tuple[int, float]] = []
    for index, rate in enumerate(rates):
        if levels and levels[-1][1] == rate:
            levels[-1] = (index, rate)
        else:
            levels.append((index, rate))
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
