"""What was measured, compared with expected lines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from cli.results import mean_of, single

from ckpt_avg.cli.average_text import evaluation_lines
from ckpt_avg.user_code.comparison import Comparison, Evaluation, compare
from ckpt_avg.user_code.gate import outcomes, parse_requirement

NAN, INF = math.nan, math.inf


def test_no_table_without_evaluations() -> None:
    assert evaluation_lines([], None, []) == []


ROWS = [
    single("step_8.pt", accuracy=0.5, loss=2.0),
    replace(single("step_8.pt", accuracy=0.75, loss=1.75), refreshed=True),
    mean_of("average, statistics averaged", accuracy=0.25, loss=2.5),
    mean_of("average, statistics refreshed", accuracy=0.625, loss=1.5),
]


def test_the_last_checkpoint_and_the_average() -> None:
    """The difference to the refreshed last checkpoint is in brackets, with its sign."""
    comparison = Comparison(compare(ROWS[1], ROWS[3], {}), compare(ROWS[0], ROWS[1], {}))
    assert evaluation_lines(ROWS, comparison, []) == [
        "                               accuracy        loss",
        "step_8.pt (last)               0.5 (-0.25)     2 (+0.25)",
        "last, statistics refreshed     0.75            1.75",
        "average, statistics averaged   0.25 (-0.5)     2.5 (+0.75)",
        "average, statistics refreshed  0.625 (-0.125)  1.5 (-0.25)",
        "averaging: accuracy -0.125 (worse), loss -0.25 (better); the refresh helped: accuracy +0.25 (better), "
        "loss -0.25 (better)",
    ]


def test_without_a_refresh_the_last_checkpoint_is_the_reference() -> None:
    rows = [single("a.pt", accuracy=0.5), mean_of("average", accuracy=0.5)]
    assert evaluation_lines(rows, Comparison(compare(rows[0], rows[1], {}), ()), []) == [
        "             accuracy",
        "a.pt (last)  0.5",
        "average      0.5 (+0)",
        "averaging did not help: accuracy +0 (equal)",
    ]


def test_the_spread_of_repeats_is_shown() -> None:
    """And a difference that is no larger than its own spread is called so, and no help."""
    rows = [
        Evaluation("a.pt", Path("a.pt"), {"loss": 2.0}, False, {"loss": (1.0, 3.0)}),
        Evaluation("average", None, {"loss": 1.5}, False, {"loss": (1.5, 1.5)}),
    ]
    assert evaluation_lines(rows, Comparison(compare(rows[0], rows[1], {}), ()), [])[1:] == [
        "a.pt (last)  2 ±1.4",
        "average      1.5 ±0 (-0.5)",
        "averaging did not help: loss -0.5 ±1.4 (within the spread)",
    ]


@pytest.mark.parametrize("refreshed", [False, True])
def test_all_checkpoints_and_their_mean(refreshed: bool) -> None:
    """The mean of the checkpoints is a row of its own, and only the last one is called last."""
    rows = [single("a.pt", m=1.0), single("b.pt", m=2.0), single("c.pt", m=6.0)]
    average = mean_of("average", m=6.5)
    if not refreshed:
        assert evaluation_lines([*rows, average], None, []) == [
            "               m",
            "a.pt           1 (-5)",
            "b.pt           2 (-4)",
            "c.pt (last)    6",
            "mean of the 3  3 (-3)",
            "average        6.5 (+0.5)",
        ]
    else:
        others = [replace(row, name=f"{row.name}, statistics refreshed", refreshed=True) for row in rows]
        assert evaluation_lines([single("c.pt", m=5.0), *others, average], None, []) == [
            "                                     m",
            "c.pt (last)                          5 (-1)",
            "a.pt, statistics refreshed           1 (-5)",
            "b.pt, statistics refreshed           2 (-4)",
            "last, statistics refreshed           6",
            "mean of the 3, statistics refreshed  3 (-3)",
            "average                              6.5 (+0.5)",
        ]


def test_requirements_follow_the_table() -> None:
    rows = [single("a.pt", m=1.0), mean_of("average", m=0.5)]
    found = outcomes([parse_requirement("m>=last"), parse_requirement("m<=last")], rows[-1], rows[:1], rows[0])
    assert evaluation_lines(rows, None, found)[-2:] == [
        "NOT MET: m>=last: expected >= 1, got 0.5",
        "met: m<=last: expected <= 1, got 0.5",
    ]


@pytest.mark.parametrize(
    "values",
    [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (INF, 1.0), (1.0, -INF), (INF, INF)],
)
def test_nan_and_infinity_can_be_shown(values: tuple[float, float]) -> None:
    """A diverged checkpoint must not end the command after the averaging is done."""
    rows = [single("a.pt", m=values[0]), single("b.pt", m=values[1]), mean_of("average", m=values[0])]
    lines = evaluation_lines(rows, None, [])
    assert len(lines) == 5
    assert ("nan" in "".join(lines)) or ("inf" in "".join(lines))


@pytest.mark.parametrize("values", [(INF, -INF), (1.7e308, 1.7e308)], ids=["inf and -inf", "sum overflows"])
def test_a_mean_that_overflows_is_no_crash(values: tuple[float, float]) -> None:
    """The output is published by then: the table must not end in a traceback."""
    assert len(evaluation_lines([single("a.pt", m=values[0]), single("b.pt", m=values[1])], None, [])) == 4


def test_the_order_of_a_dict_of_metrics_does_not_matter() -> None:
    """A function may return its dict in another order each time."""
    rows = [
        Evaluation("a.pt", Path("a.pt"), {"x": 1.0, "y": 2.0}),
        Evaluation("average", None, {"y": 20.0, "x": 10.0}),
    ]
    assert evaluation_lines(rows, None, [])[-1].split() == ["average", "10", "(+9)", "20", "(+18)"]
