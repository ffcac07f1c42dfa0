"""JSON documents: every digit, every row, and only values that strict parsers accept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from cli.results import VALUES, mean_of, single, swept

from ckpt_avg.commands.documents import evaluations_json, sweep_json
from ckpt_avg.results import plain
from ckpt_avg.user_code.comparison import Change, Comparison
from ckpt_avg.user_code.gate import outcomes, parse_requirement


def test_nothing_measured() -> None:
    assert evaluations_json([], None, []) == {"evaluations": [], "comparison": None, "requirements": []}


def test_json_has_every_digit_and_every_row() -> None:
    rows = [single("a.pt", m=0.1 + 0.2), mean_of("average", m=1 / 3)]
    found = outcomes([parse_requirement("m>=last+0.25")], rows[-1], rows[:1], rows[0])
    rows[-1] = replace(rows[-1], refreshed=True, samples={"m": (0.0, 2 / 3)})
    comparison = Comparison((Change("m", 1 / 32, None, "better"),), ())
    assert json.loads(json.dumps(evaluations_json(rows, comparison, found), allow_nan=False)) == {
        "evaluations": [
            {
                "name": "a.pt",
                "path": "run/a.pt",
                "metrics": {"m": 0.30000000000000004},
                "refreshed": False,
                "samples": {},
            },
            {"name": "average", "path": None, "metrics": {"m": 1 / 3}, "refreshed": True, "samples": {"m": [0, 2 / 3]}},
        ],
        "comparison": {
            "averaging": [{"metric": "m", "difference": 1 / 32, "spread": None, "verdict": "better"}],
            "refresh": [],
        },
        "requirements": [{"requirement": "m>=last+0.25", "value": 1 / 3, "threshold": 0.55, "met": False}],
    }


def test_json_has_null_for_what_it_cannot_say() -> None:
    """NaN and Infinity are no JSON: strict parsers refuse the document."""
    assert plain({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0}) == {
        "a": None,
        "b": None,
        "c": None,
        "d": 0.0,
    }
    rows = [single("a.pt", m=math.nan), mean_of("average", m=math.inf)]
    found = outcomes([parse_requirement("m>=last")], rows[-1], rows[:1], rows[0])
    document = json.loads(json.dumps(evaluations_json(rows, None, found), allow_nan=False))
    assert document["requirements"] == [{"requirement": "m>=last", "value": None, "threshold": None, "met": False}]


def test_sweep_as_json() -> None:
    result = swept(VALUES, ("first", 2), last=0.5)
    document = json.loads(json.dumps(sweep_json(result, ["ckpt-avg", "average", "a b"]), allow_nan=False))
    assert set(document) == {
        "ckpt_avg", "checkpoints", "skipped", "metric", "mode", "split", "refreshed", "last", "reference", "windows",
        "steps", "unit", "weightings", "best", "change", "command", "passes", "engine", "notices",
    }  # fmt: skip
    assert document["checkpoints"] == ["run/step_1.pt", "run/step_2.pt", "run/step_3.pt"]
    assert document["skipped"] == [{"path": "run/log.txt", "reason": "no checkpoint"}]
    assert (document["last"]["path"], document["last"]["metrics"]) == ("run/step_3.pt", {"m": 0.375, "other": 1.0})
    assert (document["reference"]["refreshed"], document["reference"]["metrics"]) == (True, {"m": 0.5, "other": 1.0})
    assert document["change"] == {"metric": "m", "difference": 0.0, "spread": None, "verdict": "equal"}
    assert [(each["side"], each["size"], each["metrics"]["m"]) for each in document["windows"]] == [
        (side, size, value) for (side, size), value in VALUES.items()
    ]
    assert document["best"] == {
        "side": "first",
        "size": 2,
        "checkpoints": ["run/step_1.pt", "run/step_2.pt"],
        "metrics": {"m": 0.5, "other": None},
        "samples": {},
        "weighting": "mean",
        "weights": None,
    }
    assert document["command"] == ["ckpt-avg", "average", "a b"]
    assert (document["metric"], document["mode"], document["refreshed"], document["passes"]) == ("m", "max", True, 2)
    assert document["notices"] == ["a notice"]
