"""The weights of each rule: against published numbers, exact arithmetic, and averages that a training loop kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import pytest

from ckpt_avg.mean.weight_formulas import decay_weights, ema_weights, exponent_of, power_weights

EVEN = [0, 1, 2, 3, 4]
UNEVEN = [0, 100, 200, 1000]


# -- Published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (decay_weights(range(4), "minus-sqrt"), [0.500, 0.207, 0.159, 0.134]),  # WSM, arXiv:2507.17634
        (decay_weights(UNEVEN, "minus-sqrt"), [0.236, 0.098, 0.412, 0.255]),
        (decay_weights(EVEN, "cosine"), [0.095, 0.250, 0.309, 0.250, 0.095]),
        (decay_weights(UNEVEN, "linear"), [100 / 1800, 100 / 1800, 800 / 1800, 800 / 1800]),
        (ema_weights([0, 100, 300], 100.0), [1 / 11, 2 / 11, 8 / 11]),
        (power_weights([100, 200, 400], 1.0), [1 / 16, 3 / 16, 12 / 16]),
        (power_weights([200, 300, 400], 1.0, before=100), [3 / 15, 5 / 15, 7 / 15]),
    ],
)
def test_known_weights(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 20])
def test_the_coefficients_are_those_of_megatron(count: int) -> None:
    """Its ``weighted_merge.py`` takes differences of 1 − √x between positions, and gives the first the rest.

    https://github.com/NVIDIA/Megatron-LM/blob/main/tools/checkpoint/weighted_merge.py: ``minus-sqrt`` and ``linear``.
    """
    for decay, s in (("minus-sqrt", lambda x: 1 - math.sqrt(x)), ("linear", lambda x: 1 - x)):
        heights = [s(index / count) for index in range(count)] + [0.0]
        later = [high - low for high, low in itertools.pairwise(heights[1:])]
        assert decay_weights(range(count), decay) == pytest.approx([1 - sum(later), *later], abs=1e-15)


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.83)])
def test_the_exponents_of_widths(width: float, exponent: float) -> None:
    """Table of Karras et al. 2024 (arXiv:2312.02696)."""
    assert exponent_of(width) == pytest.approx(exponent, abs=5e-3)


@pytest.mark.parametrize("width", [1e-6, 0.01, 0.1, 0.25, 0.288675])
def test_the_width_of_the_weights_is_what_was_asked_for(width: float) -> None:
    """The standard deviation of a distribution over 0 … 1 with the density (γ + 1) t^γ."""
    gamma = exponent_of(width)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=1e-9)
    if width > 0.001:
        assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)


# -- Exact arithmetic -------------------------------------------------------------------------------------------------


def exactly(rule: str, steps: Sequence[int], *, before: int = 0, value: float = 0.0) -> list[Any]:
    """The weights by their definition, with 60 digits."""
    with mpmath.workdps(60):
        times = [mpmath.mpf(step) for step in steps]
        if rule == "ema":
            raw = [mpmath.mpf(2) ** ((time - times[-1]) / value) for time in times]
        elif rule == "power":
            powers = [(time / times[-1]) ** (mpmath.mpf(value) + 1) for time in (mpmath.mpf(before), *times)]
            raw = [high - low for low, high in itertools.pairwise(powers)]
        else:
            s: Callable[[Any], Any] = {
                "linear": lambda x: 1 - x,
                "minus-sqrt": lambda x: 1 - mpmath.sqrt(x),
                "cosine": lambda x: (1 + mpmath.cos(mpmath.pi * x)) / 2,
            }[rule]
            length = times[-1] - times[0] + (times[-1] - times[-2])
            places = [(time - times[0]) / length for time in times] + [mpmath.mpf(1)]
            raw = [s(low) - s(high) for low, high in itertools.pairwise(places)]
        total = sum(raw)
        return [each / total for each in raw]


STEPS = [
    [0, 1],
    [5, 6, 7, 8],
    [0, 100, 200, 1000],
    [10**9, 10**9 + 1, 10**9 + 3],
    [1, 2**62],
    [1000 * index for index in range(1, 60)],
]


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: f"{steps[0]}…{steps[-1]}")
@pytest.mark.parametrize("rule", ["linear", "minus-sqrt", "cosine", "ema", "power"])
def test_every_weight_is_as_precise_as_float64(rule: str, steps: list[int]) -> None:
    """If terms that nearly cancel were subtracted, checkpoints a few steps apart late in a run would get noise."""
    span = float(steps[-1] - steps[0])
    if rule == "ema":
        found, expected = ema_weights(steps, span / 3), exactly("ema", steps, value=span / 3)
    elif rule == "power":
        before = max(0, 2 * steps[0] - steps[1])
        found = power_weights(steps, 6.94, before)
        expected = exactly("power", steps, before=before, value=6.94)
    else:
        found, expected = decay_weights(steps, rule), exactly(rule, steps)
    for each, exact in zip(found, expected, strict=True):
        assert abs(each - exact) <= 64 * 2.0**-52 * exact
    assert math.fsum(found) == pytest.approx(1, abs=1e-15)


# -- Averages kept during training ------------------------------------------------------------------------------------


def trajectory(steps: int) -> list[float]:
    """A weight that training moves: a decaying transient and a slow oscillation. Index t is after step t."""
    return [math.exp(-3 * t / steps) + 0.2 * math.sin(9 * t / steps) for t in range(steps + 1)]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_power_on_checkpoints_is_nearly_the_average_that_training_kept(width: float) -> None:
    """The closer the checkpoints, the nearer; with one for each step it is that average."""
    steps, gamma = 4096, exponent_of(width)
    values = trajectory(steps)
    kept = 0.0
    for t in range(1, steps + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        kept = beta * kept + (1 - beta) * values[t]
    errors = []
    for spacing in (256, 64, 16, 4, 1):
        saved = range(spacing, steps + 1, spacing)
        weights = power_weights(saved, gamma)
        errors.append(abs(math.fsum(weight * values[t] for weight, t in zip(weights, saved, strict=True)) - kept))
    assert errors[-1] < 1e-13
    assert all(2.5 * later < earlier for earlier, later in itertools.pairwise(errors))


def test_power_on_a_window_is_the_average_kept_since_its_begin() -> None:
    """The first checkpoint of a window counts from the step of the one before, not from the start of the training."""
    steps, gamma, before = 4096, exponent_of(0.1), 3072
    values = trajectory(steps)
    inside = [(t / steps) ** (gamma + 1) - ((t - 1) / steps) ** (gamma + 1) for t in range(before + 1, steps + 1)]
    kept = sum(w * value for w, value in zip(inside, values[before + 1 :], strict=True)) / sum(inside)
    saved = range(before + 1, steps + 1)

    def error(begin: int) -> float:
        weights = power_weights(saved, gamma, begin)
        return abs(sum(w * values[t] for w, t in zip(weights, saved, strict=True)) - kept)

    assert error(before) < 1e-13 < 1e-3 < error(0)


def test_ema_on_every_step_is_the_average_that_training_kept() -> None:
    """Apart from what is left of the first weights, which the sequential form keeps as a lump."""
    beta, values = 0.7, trajectory(60)
    kept = values[1]
    for value in values[2:]:
        kept = beta * kept + (1 - beta) * value
    weights = ema_weights(range(1, 61), math.log(0.5) / math.log(beta))
    assert sum(w * value for w, value in zip(weights, values[1:], strict=True)) == pytest.approx(kept, abs=1e-8)
