"""The tables and the JSON of measurements, held against numbers and lines written out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from ckpt_avg.cli.report_evaluation import (
    evaluation_lines,
    evaluations_json,
    metrics_json,
    sweep_json,
    sweep_text,
    table,
)
from ckpt_avg.commands.sweep import Measured, SweepResult
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.user_code.evaluate import Evaluation
from ckpt_avg.user_code.gate import outcomes, parse_requirement

NAN, INF = math.nan, math.inf


def single(name: str, **metrics: float) -> Evaluation:
    return Evaluation(name, Path("run") / name, metrics)


def mean_of(name: str, **metrics: float) -> Evaluation:
    return Evaluation(name, None, metrics)


# ---------------------------------------------------------------------------------------------------------------------
# average, refresh-bn


def test_nothing_measured_is_nothing_said() -> None:
    assert evaluation_lines([], []) == []
    assert evaluations_json([], []) == {"evaluations": [], "requirements": []}


def test_the_last_checkpoint_and_the_average() -> None:
    """In brackets stands the difference to the last checkpoint, with its sign."""
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


def test_requirements_stand_below() -> None:
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
def test_numbers_that_are_none_can_be_shown(values: tuple[float, float]) -> None:
    """A diverged checkpoint must not end the command after the averaging is done."""
    rows = [single("a.pt", m=values[0]), single("b.pt", m=values[1]), mean_of("average", m=values[0])]
    lines = evaluation_lines(rows, [])
    assert len(lines) == 5
    assert ("nan" in "".join(lines)) or ("inf" in "".join(lines))


@pytest.mark.parametrize("values", [(INF, -INF), (1.7e308, 1.7e308)], ids=["inf and -inf", "sum overflows"])
def test_a_mean_that_cannot_be_taken_is_no_crash(values: tuple[float, float]) -> None:
    """The output is published by then: the table must not end in a traceback."""
    assert len(evaluation_lines([single("a.pt", m=values[0]), single("b.pt", m=values[1])], [])) == 4


def test_columns_follow_the_longest_cell() -> None:
    """A column is as wide as its widest cell, the header included, and no line ends in blanks."""
    lines = table(
        ["a", "a long name"],
        [("x", {"a": 123456.0, "a long name": 1.0}, None), ("longer", {"a": 1.0, "a long name": 2.0}, None)],
    )
    assert lines == ["        a       a long name", "x       123456  1", "longer  1       2"]
    assert all(line == line.rstrip() for line in lines)


def test_a_metric_is_shown_wherever_it_stands_in_the_dict() -> None:
    """A function may return its dict in another order each time."""
    rows = [
        Evaluation("a.pt", Path("a.pt"), {"x": 1.0, "y": 2.0}),
        Evaluation("average", None, {"y": 20.0, "x": 10.0}),
    ]
    assert evaluation_lines(rows, [])[-1].split() == ["average", "10", "(+9)", "20", "(+18)"]


def test_json_has_every_digit_and_every_row() -> None:
    rows = [single("a.pt", m=0.1 + 0.2), mean_of("average", m=1 / 3)]
    found = outcomes([parse_requirement("m>=last+0.25")], rows[-1], rows[:1])
    assert json.loads(json.dumps(evaluations_json(rows, found), allow_nan=False)) == {
        "evaluations": [
            {"name": "a.pt", "path": "run/a.pt", "metrics": {"m": 0.30000000000000004}},
            {"name": "average", "path": None, "metrics": {"m": 1 / 3}},
        ],
        "requirements": [{"requirement": "m>=last+0.25", "value": 1 / 3, "threshold": 0.55, "met": False}],
    }


def test_json_has_null_for_what_it_cannot_say() -> None:
    """NaN and Infinity are no JSON: strict parsers refuse the whole document."""
    assert metrics_json({"a": NAN, "b": INF, "c": -INF, "d": 0.0}) == {"a": None, "b": None, "c": None, "d": 0.0}
    rows = [single("a.pt", m=NAN), mean_of("average", m=INF)]
    found = outcomes([parse_requirement("m>=last")], rows[-1], rows[:1])
    document = json.loads(json.dumps(evaluations_json(rows, found), allow_nan=False))
    assert document["requirements"] == [{"requirement": "m>=last", "value": None, "threshold": None, "met": False}]


# ---------------------------------------------------------------------------------------------------------------------
# sweep


def swept(
    values: Mapping[tuple[str, int], float], best: tuple[str, int], *, last: float, mode: str = "max", total: int = 3
) -> SweepResult:
    paths = tuple(Path("run") / f"step_{number}.pt" for number in range(1, total + 1))
    windows = {
        (side, size): Measured(side, paths[-size:] if side == "last" else paths[:size], {"m": value, "other": NAN})  # type: ignore[arg-type]
        for (side, size), value in values.items()
    }
    return SweepResult(
        checkpoints=paths,
        skipped=(Skipped(Path("run/log.txt"), "no checkpoint"),),
        last=Evaluation("step_3.pt", paths[-1], {"m": last, "other": 1.0}),
        windows=tuple(windows.values()),
        metric="m",
        mode=mode,
        best=windows[best],
        refreshed=True,
        passes=2,
        notices=("a notice",),
    )


VALUES = {("last", 1): 0.5, ("last", 2): 0.75, ("last", 3): 0.625, ("first", 1): 0.25, ("first", 2): 0.5}


def test_sweep_in_words() -> None:
    assert sweep_text(swept(VALUES, ("last", 2), last=0.5), "ckpt-avg average run") == "\n".join(
        [
            "                     m               other",
            "step_3.pt, as it is  0.5             1",
            "last 1               0.5 (+0)        nan (+nan)",
            "last 2  ← best       0.75 (+0.25)    nan (+nan)",
            "all 3                0.625 (+0.125)  nan (+nan)",
            "first 1              0.25 (-0.25)    nan (+nan)",
            "first 2              0.5 (+0)        nan (+nan)",
            "",
            "best by m: the average of the last 2, 0.75, +0.25 against step_3.pt as it is",
            "to make it: ckpt-avg average run",
        ]
    )


@pytest.mark.parametrize(
    ("best", "last", "mode", "line"),
    [
        (("last", 3), 0.5, "max", "best by m: the average of all 3, 0.625, +0.125 against step_3.pt as it is"),
        (("first", 2), 0.25, "max", "best by m: the average of the first 2, 0.5, +0.25 against step_3.pt as it is"),
        (("first", 1), 0.5, "min", "best by m: the average of the first 1, 0.25, -0.25 against step_3.pt as it is"),
        (
            ("last", 2),
            0.75,
            "max",
            "best by m: the average of the last 2, 0.75, which is no better than step_3.pt as it is (0.75)",
        ),
        (
            ("first", 1),
            0.125,
            "min",
            "best by m: the average of the first 1, 0.25, which is no better than step_3.pt as it is (0.125)",
        ),
        (
            ("last", 2),
            NAN,
            "max",
            "best by m: the average of the last 2, 0.75, which is no better than step_3.pt as it is (nan)",
        ),
    ],
)
def test_whether_averaging_helps_is_said(best: tuple[str, int], last: float, mode: str, line: str) -> None:
    """An average that is only the best of the averages, and worse than the last checkpoint, is not praised."""
    assert sweep_text(swept(VALUES, best, last=last, mode=mode), "c").splitlines()[-2] == line


def test_sweep_as_json() -> None:
    result = swept(VALUES, ("first", 2), last=0.5)
    document = json.loads(json.dumps(sweep_json(result, ["ckpt-avg", "average", "a b"]), allow_nan=False))
    assert set(document) == {
        "checkpoints", "skipped", "metric", "mode", "refreshed", "last", "windows", "best", "command", "passes",
        "notices",
    }  # fmt: skip
    assert document["checkpoints"] == ["run/step_1.pt", "run/step_2.pt", "run/step_3.pt"]
    assert document["skipped"] == [{"path": "run/log.txt", "reason": "no checkpoint"}]
    assert document["last"] == {"path": "run/step_3.pt", "metrics": {"m": 0.5, "other": 1.0}}
    assert [(each["side"], each["size"], each["metrics"]["m"]) for each in document["windows"]] == [
        (side, size, value) for (side, size), value in VALUES.items()
    ]
    assert document["best"] == {
        "side": "first",
        "size": 2,
        "checkpoints": ["run/step_1.pt", "run/step_2.pt"],
        "metrics": {"m": 0.5, "other": None},
    }
    assert document["command"] == ["ckpt-avg", "average", "a b"]
    assert (document["metric"], document["mode"], document["refreshed"], document["passes"]) == ("m", "max", True, 2)
    assert document["notices"] == ["a notice"]
