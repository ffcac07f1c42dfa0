"""The text of a sweep, compared with expected lines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from cli.results import VALUES, swept, with_rule

from ckpt_avg.cli.sweep_text import sweep_text
from ckpt_avg.user_code.comparison import Change

NAN = math.nan


def test_sweep_in_words() -> None:
    assert sweep_text(swept(VALUES, ("last", 2), last=0.5), "ckpt-avg average run") == "\n".join(
        [
            "                            m               other",
            "step_3.pt (last)            0.375 (-0.125)  1 (+0)",
            "last, statistics refreshed  0.5             1",
            "last 1                      0.5 (+0)        nan",
            "last 2  ← best              0.75 (+0.25)    nan",
            "all 3                       0.625 (+0.125)  nan",
            "first 1                     0.25 (-0.25)    nan",
            "first 2                     0.5 (+0)        nan",
            "",
            "best by m: the average of the last 2, 0.75, +0.25 compared with the refreshed last checkpoint",
            "to write it: ckpt-avg average run",
        ]
    )


def test_without_a_refresh_a_sweep_compares_with_the_last_checkpoint() -> None:
    result = swept(VALUES, ("last", 2), last=0.5)
    result = replace(result, last=result.reference, reference=result.reference, refreshed=False)
    lines = sweep_text(replace(result, last=result.reference), "c").splitlines()
    assert len(lines) == 10
    assert (
        lines[-2] == "best by m: the average of the last 2, 0.75, +0.25 compared with step_3.pt, statistics refreshed"
    )


@pytest.mark.parametrize(
    ("best", "last", "mode", "line"),
    [
        (("last", 3), 0.5, "max", "all 3, 0.625, +0.125 compared with"),
        (("first", 2), 0.25, "max", "the first 2, 0.5, +0.25 compared with"),
        (("first", 1), 0.5, "min", "the first 1, 0.25, -0.25 compared with"),
        (("last", 2), 0.75, "max", "the last 2, 0.75, no better than (0.75)"),
        (("first", 1), 0.125, "min", "the first 1, 0.25, no better than (0.125)"),
        (("last", 2), NAN, "max", "the last 2, 0.75, no better than (nan)"),
    ],
)
def test_the_text_says_whether_averaging_helps(best: tuple[str, int], last: float, mode: str, line: str) -> None:
    """An average that is only the best of the averages, and worse than the last checkpoint, is not praised."""
    *_, found, command = sweep_text(swept(VALUES, best, last=last, mode=mode), "c").splitlines()
    assert found.replace(" the refreshed last checkpoint", "") == f"best by m: the average of {line}"
    assert command == ("to write it: c" if "compared" in line else "to write it anyway: c")


def test_a_best_average_within_the_spread_is_not_praised() -> None:
    result = swept(VALUES, ("last", 2), last=0.5)
    result = replace(result, change=Change("m", 0.25, 0.5, "within the spread"))
    *_, found, command = sweep_text(result, "c").splitlines()
    assert "+0.25 ±0.5, within the spread, compared with the refreshed last checkpoint" in found
    assert command == "to write it anyway: c"


def test_several_rules_are_next_to_each_other() -> None:
    """One row for each window, in it the metric with each rule; then the weights of the best average."""
    result = swept({("last", 1): 0.5, ("last", 2): 0.25, ("last", 3): 0.75}, ("last", 3), last=0.5)
    lines = sweep_text(with_rule(result, "ema:5", 0.125), "c").splitlines()
    assert lines == [
        "m                           mean   ema:5",
        "step_3.pt (last)            0.375",
        "last, statistics refreshed  0.5",
        "last 1                      0.5    0.625",
        "last 2                      0.25   0.375",
        "all 3                       0.75   0.875 ← best",
        "",
        "best by m: the average of all 3 with ema:5, 0.875, +0.25 compared with the refreshed last checkpoint",
        "checkpoint  step  weight",
        "step_1.pt   1     0.25",
        "step_2.pt   2     0.25",
        "step_3.pt   3     0.5",
        "to write it: c",
    ]
