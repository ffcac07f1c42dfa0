"""The weights of each rule, in float64. docs/weights.md has the formulas with their sources.

Checkpoints are numbered 0 … n−1, the oldest first; T is the step of the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def decay_weights(steps: Sequence[int], decay: str) -> list[float]:
    """Returns s(xᵢ) − s(xᵢ₊₁) for a decay s from s(0) = 1 to s(1) = 0; the steps, and one more, become 0 … 1 on x.

    Args:
        steps: increasing.
        decay: ``linear``: 1 − x; ``minus-sqrt``: 1 − √x; ``cosine``: (1 + cos πx) / 2.

    Example:
        >>> [round(weight, 3) for weight in decay_weights(range(4), "minus-sqrt")]
        [0.5, 0.207, 0.159, 0.134]
    """
    if len(steps) == 1:
        return [1.0]
    begins = [step - steps[0] for step in steps]
    ends = [*begins[1:], 2 * begins[-1] - begins[-2]]
    length = ends[-1]

    def weight(begin: int, end: int) -> float:
        # No formula subtracts two numbers that are nearly equal, so that every weight is as precise as float64.
        if decay == "cosine":
            middle = min(begin + end, 2 * length - begin - end)  # so that the weights of even spacing are symmetric
            return math.sin(math.pi * middle / (2 * length)) * math.sin(math.pi * (end - begin) / (2 * length))
        share = (end - begin) / length
        return share if decay == "linear" else share / (math.sqrt(end / length) + math.sqrt(begin / length))

    return [weight(begin, end) for begin, end in zip(begins, ends, strict=True)]


def ema_weights(steps: Sequence[int], half_life: float) -> list[float]:
    """Returns weights in proportion to 2^((t − T) / half_life), T being the last step.

    Example:
        >>> ema_weights([100, 200, 300], 100)
        [0.14285714285714285, 0.2857142857142857, 0.5714285714285714]
    """
    return normalized([2.0 ** ((step - steps[-1]) / half_life) for step in steps])


def power_weights(steps: Sequence[int], exponent: float, before: int = 0) -> list[float]:
    """Returns weights in proportion to the integral of t^exponent from the step before each checkpoint to its own.

    Args:
        steps: increasing, 0 or more.
        exponent: γ in Karras et al. 2024.
        before: the step from which the first checkpoint counts.

    Example:
        >>> power_weights([1, 2, 3, 4], 1.0)
        [0.0625, 0.1875, 0.3125, 0.4375]
    """

    def weight(begin: int, end: int) -> float:
        if end == 0:
            return 0.0
        ratio = math.log1p((begin - end) / end) if 2 * begin > end else math.log(begin / end) if begin else -math.inf
        return math.pow(end / steps[-1], exponent + 1) * -math.expm1((exponent + 1) * ratio)

    return normalized([weight(begin, end) for begin, end in zip([before, *steps], steps, strict=False)])


def normalized(values: Sequence[float]) -> list[float]:
    """Returns numbers divided by their sum, each rounded once."""
    from fractions import Fraction  # not for --help

    total = sum(map(Fraction, values), Fraction(0))
    return [float(Fraction(value) / total) for value in values]


def exponent_of(width: float) -> float:
    """Returns γ of a relative width: the positive root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻².

    Example:
        >>> [round(exponent_of(width), 2) for width in (0.05, 0.10, 0.15, 0.20)]
        [16.97, 6.94, 3.56, 1.83]
    """
    linear, constant = 16 - width**-2, 12 - width**-2
    root = 1 / width
    while True:  # Newton's method from above the only root of a convex function: it decreases until it is there
        value = ((root + 7) * root + linear) * root + constant
        lower = root - value / ((3 * root + 14) * root + linear)
        if not lower < root:
            return root
        root = lower
