"""Where a cyclical learning rate is at the bottom: there, and nowhere else, SWA takes its weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg.runs.cycles import bottoms

RATES = st.lists(st.sampled_from([0.01, 0.02, 0.05, 0.1]), max_size=30)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], []),
        ([0.1], []),
        ([0.1, 0.1, 0.1], []),
        ([0.3, 0.2, 0.1], []),
        ([0.1, 0.2, 0.3], []),
        ([0.1, 0.2, 0.1], []),
        ([0.2, 0.1, 0.2], [1]),
        ([0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1, 0.05], [2, 5]),
        # As low as the bottom beside them, the first and the last count too.
        ([0.01, 0.1, 0.01, 0.1, 0.01], [0, 2, 4]),
        ([0.01, 0.1, 0.01], []),
        ([0.1, 0.01, 0.1, 0.01], [1, 3]),
        ([0.01, 0.1, 0.01, 0.1], [0, 2]),
        # However much lower the last is: a run may end at a new bottom, as SGDR with falling minima does.
        ([0.1, 0.05, 0.1, 0.01], [1, 3]),
        ([0.1, 0.05, 0.1, 0.06], [1]),
        # A warmup begins lower than any cycle; a run may end on the way down.
        ([0.0, 0.1, 0.01, 0.1, 0.01, 0.1, 0.05], [2, 4]),
        # A plateau counts once, by its last.
        ([0.1, 0.01, 0.01, 0.01, 0.1, 0.01, 0.1], [3, 5]),
        ([0.1, 0.01, 0.01, 0.1, 0.1, 0.01, 0.01], [2, 6]),
    ],
)
def test_bottoms(rates: list[float], expected: list[int]) -> None:
    assert bottoms(rates) == expected


@given(RATES)
def test_each_bottom_is_below_what_surrounds_it(rates: list[float]) -> None:
    """Whatever the rates: indices in order, each a local minimum, none twice."""
    found = bottoms(rates)
    assert found == sorted(set(found))
    for index in found:
        before = next((rate for rate in reversed(rates[:index]) if rate != rates[index]), math.inf)
        assert before > rates[index]
        assert index + 1 == len(rates) or rates[index + 1] > rates[index]


@given(RATES)
def test_every_inner_minimum_is_found(rates: list[float]) -> None:
    found = bottoms(rates)
    for index in range(1, len(rates) - 1):
        if rates[index - 1] > rates[index] < rates[index + 1]:
            assert index in found


@given(RATES, st.sampled_from([2.0, 0.5, 1024.0]))
def test_the_scale_of_the_rate_does_not_matter(rates: list[float], factor: float) -> None:
    assert bottoms([rate * factor for rate in rates]) == bottoms(rates)


@given(st.lists(st.sampled_from([0.01, 0.05, 0.1]), min_size=1, max_size=10), st.integers(1, 4))
def test_how_often_a_rate_is_logged_does_not_matter(rates: list[float], times: int) -> None:
    """Logged per batch or per epoch: the bottoms are the same, each by its last entry."""
    often = [rate for rate in rates for _ in range(times)]
    assert bottoms(often) == [index * times + times - 1 for index in bottoms(rates)]


def schedule(make: str, steps: int) -> list[float]:
    """The rates at which each step is made, by torch's own schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler = {
        "cosine restarts": lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, eta_min=0.001),
        "triangles": lambda: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=5),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "steps": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 10),
    }[make]()
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ("cosine restarts", [9, 19, 29, 39]),
        ("triangles", [0, 10, 20, 30, 40]),
        ("one cycle", []),
        ("cosine", []),
        ("steps", []),
    ],
)
def test_the_schedules_of_torch(make: str, expected: list[int]) -> None:
    """Restarts end a cycle at the lowest rate; triangles turn there; what only falls has no cycles."""
    found = bottoms(schedule(make, 41))
    assert found == expected
