"""Texts, compared with expected lines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from cli.results import VALUES, mean_of, single, swept

from ckpt_avg.cli.reports import evaluation_lines, sweep_text
from ckpt_avg.user_code.evaluate import Evaluation
from ckpt_avg.user_code.gate import outcomes, parse_requirement

NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------------------------------------------------------------
# average, refresh-bn


def test_no_table_without_evaluations() -> None:
    assert evaluation_lines([], []) == []


def test_the_last_checkpoint_and_the_average() -> None:
    """The difference to the last checkpoint is in brackets, with its sign."""
    rows = [
        single("step_8.pt", accuracy=0.5, loss=2.0),
        mean_of("average, statistics averaged", accuracy=0.25, loss=2.5),
        mean_of("average, statistics refreshed", accuracy=0.75, loss=1.5),
    ]
    assert evaluation_lines(rows, []) == [
        "                               accuracy      loss",
        "step_8.pt (last)               0.5           2",
        "average, statistics averaged   0.25 (-0.25)  2.5 (+0.5)",
        "average, statistics refreshed  0.75 (+0.25)  1.5 (-0.5)",
    ]


def test_all_checkpoints_and_their_mean() -> None:
    """The mean of the checkpoints is a row of its own, and only the last one is called last."""
    rows = [single("a.pt", m=1.0), single("b.pt", m=2.0), single("c.pt", m=6.0), mean_of("average", m=6.5)]
    assert evaluation_lines(rows, []) == [
        "                     m",
        "a.pt                 1",
        "b.pt                 2",
        "c.pt (last)          6",
        "mean of the above 3  3 (-3)",
        "average              6.5 (+0.5)",
    ]


def test_requirements_follow_the_table() -> None:
    rows = [single("a.pt", m=1.0), mean_of("average", m=0.5)]
    found = outcomes([parse_requirement("m>=last"), parse_requirement("m<=last")], rows[-1], rows[:1])
    assert evaluation_lines(rows, found)[-2:] == [
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
    lines = evaluation_lines(rows, [])
    assert len(lines) == 5
    assert ("nan" in "".join(lines)) or ("inf" in "".join(lines))


@pytest.mark.parametrize("values", [(INF, -INF), (1.7e308, 1.7e308)], ids=["inf and -inf", "sum overflows"])
def test_a_mean_that_overflows_is_no_crash(values: tuple[float, float]) -> None:
    """The output is published by then: the table must not end in a traceback."""
    assert len(evaluation_lines([single("a.pt", m=values[0]), single("b.pt", m=values[1])], [])) == 4


def test_the_order_of_a_dict_of_metrics_does_not_matter() -> None:
    """A function may return its dict in another order each time."""
    rows = [
        Evaluation("a.pt", Path("a.pt"), {"x": 1.0, "y": 2.0}),
        Evaluation("average", None, {"y": 20.0, "x": 10.0}),
    ]
    assert evaluation_lines(rows, [])[-1].split() == ["average", "10", "(+9)", "20", "(+18)"]


# ---------------------------------------------------------------------------------------------------------------------
# sweep


def test_sweep_in_words() -> None:
    assert sweep_text(swept(VALUES, ("last", 2), last=0.5), "ckpt-avg average run") == "\n".join(
        [
            "                  m               other",
            "step_3.pt (last)  0.5             1",
            "last 1            0.5 (+0)        nan (+nan)",
            "last 2  ← best    0.75 (+0.25)    nan (+nan)",
            "all 3             0.625 (+0.125)  nan (+nan)",
            "first 1           0.25 (-0.25)    nan (+nan)",
            "first 2           0.5 (+0)        nan (+nan)",
            "",
            "best by m: the average of the last 2, 0.75, +0.25 compared with step_3.pt",
            "to write it: ckpt-avg average run",
        ]
    )


@pytest.mark.parametrize(
    ("best", "last", "mode", "line"),
    [
        (("last", 3), 0.5, "max", "best by m: the average of all 3, 0.625, +0.125 compared with step_3.pt"),
        (("first", 2), 0.25, "max", "best by m: the average of the first 2, 0.5, +0.25 compared with step_3.pt"),
        (("first", 1), 0.5, "min", "best by m: the average of the first 1, 0.25, -0.25 compared with step_3.pt"),
        (
            ("last", 2),
            0.75,
            "max",
            "best by m: the average of the last 2, 0.75, no better than step_3.pt (0.75)",
        ),
        (
            ("first", 1),
            0.125,
            "min",
            "best by m: the average of the first 1, 0.25, no better than step_3.pt (0.125)",
        ),
        (
            ("last", 2),
            NAN,
            "max",
            "best by m: the average of the last 2, 0.75, no better than step_3.pt (nan)",
        ),
    ],
)
def test_the_text_says_whether_averaging_helps(best: tuple[str, int], last: float, mode: str, line: str) -> None:
    """An average that is only the best of the averages, and worse than the last checkpoint, is not praised."""
    assert sweep_text(swept(VALUES, best, last=last, mode=mode), "c").splitlines()[-2] == line
