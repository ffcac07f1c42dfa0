"""What a requirement means: its grammar, what it is held against, and numbers that are none."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from ckpt_avg.errors import UsageError
from ckpt_avg.user_code.comparison import Evaluation
from ckpt_avg.user_code.gate import Outcome, needs_all, outcomes, parse_requirement, refuse_unknown_metrics

NAN, INF = math.nan, math.inf


def measured(*values: float) -> list[Evaluation]:
    return [Evaluation(f"step_{i}.pt", Path(f"step_{i}.pt"), {"m": value}) for i, value in enumerate(values)]


def held(text: str, average: float, *checkpoints: float, saved: float = NAN) -> Outcome:
    compared, (last,) = measured(*checkpoints), measured(saved)
    (outcome,) = outcomes([parse_requirement(text)], Evaluation("average", None, {"m": average}), compared, last)
    return outcome


# ---------------------------------------------------------------------------------------------------------------------
# Grammar


@pytest.mark.parametrize(
    ("text", "metric", "operator", "reference", "number"),
    [
        ("accuracy>=last", "accuracy", ">=", "last", 0.0),
        ("  accuracy  >=  last  ", "accuracy", ">=", "last", 0.0),
        ("accuracy>last", "accuracy", ">", "last", 0.0),
        ("loss<=best", "loss", "<=", "best", 0.0),
        ("loss<mean", "loss", "<", "mean", 0.0),
        ("accuracy>=last-0.001", "accuracy", ">=", "last", -0.001),
        ("accuracy >= last - 0.001", "accuracy", ">=", "last", -0.001),
        ("loss<=best+1e-2", "loss", "<=", "best", 0.01),
        ("loss <= mean +  2.5E+1", "loss", "<=", "mean", 25.0),
        ("loss<=.5", "loss", "<=", "", 0.5),
        ("loss<=5.", "loss", "<=", "", 5.0),
        ("score>=-3", "score", ">=", "", -3.0),
        ("score>=+3", "score", ">=", "", 3.0),
        ("score>1e-3", "score", ">", "", 0.001),
        ("score>=0", "score", ">=", "", 0.0),
        ("top-1 accuracy>=last", "top-1 accuracy", ">=", "last", 0.0),
        ("val/loss<=last", "val/loss", "<=", "last", 0.0),
        ("last>=best", "last", ">=", "best", 0.0),
        ("loss<=last-saved", "loss", "<=", "last-saved", 0.0),
        ("loss < last-saved - 0.5", "loss", "<", "last-saved", -0.5),
        ("Genauigkeit µ>=last", "Genauigkeit µ", ">=", "last", 0.0),
    ],
)
def test_grammar(text: str, metric: str, operator: str, reference: str, number: float) -> None:
    found = parse_requirement(text)
    assert (found.metric, found.operator, found.reference, found.number) == (metric, operator, reference, number)
    assert found.text == text, "messages and --json repeat what the user wrote"


@pytest.mark.parametrize("spaces", list(itertools.product(["", " ", "  "], repeat=4)), ids=repr)
def test_spaces_change_nothing(spaces: tuple[str, ...]) -> None:
    """A shell script's line may be padded anywhere between the words."""
    a, b, c, d = spaces
    found = parse_requirement(f"{a}loss{b}<={c}best{d}+{a}0.5{b}")
    assert (found.metric, found.operator, found.reference, found.number) == ("loss", "<=", "best", 0.5)


@pytest.mark.parametrize("space", ["\t", "\u00a0", "\n"], ids=["tab", "no-break space", "line break"])
def test_other_white_space_in_an_offset_is_read_or_refused(space: str) -> None:
    """A tab, or the no-break space of text copied from a web page, ends in a traceback."""
    try:
        found = parse_requirement(f"loss<=last +{space}0.5")
    except UsageError:
        return
    assert found.number == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "accuracy",
        "accuracy>=",
        ">=last",
        " >=last",
        "accuracy==last",
        "accuracy=>last",
        "accuracy=<last",
        "accuracy>=last and loss<=last",
        "accuracy=last",
        "accuracy!=0.5",
        "accuracy>=newest",
        "accuracy>=lastly",
        "accuracy>=best-saved",
        "accuracy>=LAST",
        "accuracy>=last-",
        "accuracy>=last 0.5",
        "accuracy>=last0.5",
        "accuracy>=last*0.5",
        "accuracy>=last-0.1-0.1",
        "accuracy>=0.5+last",
        "accuracy>=95%",
        "accuracy>=1,5",
        "accuracy>=1_000",
        "accuracy>=0x10",
        "accuracy>=nan",
        "accuracy>=inf",
        "accuracy>=-inf",
        "accuracy>=- 0.5",
        "accuracy>=.",
        "accuracy>=1e",
        "accuracy>=e5",
        "accuracy>=last\x00",
    ],
)
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_requirement(text)
    assert str(caught.value).startswith("--require ")
    assert "'accuracy>=last'" in str(caught.value)


@pytest.mark.parametrize("text", ["m<=1e400", "m>=-1e400"])
def test_a_number_that_overflows_does_not_become_a_gate_that_is_always_open(text: str) -> None:
    with pytest.raises(UsageError):
        parse_requirement(text)


def test_unknown_metric_lists_the_known_ones() -> None:
    requirements = [parse_requirement("loss<=last"), parse_requirement("acuracy>=last")]
    with pytest.raises(UsageError) as caught:
        refuse_unknown_metrics(requirements, Evaluation("x", Path("x"), {"accuracy": 1.0, "loss": 0.5}))
    assert str(caught.value) == (
        "--require 'acuracy>=last': the --eval function returns no 'acuracy'. It returns 'accuracy', 'loss'. Did you "
        "mean 'accuracy'?"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints, and which number


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], False),
        (["m>=last"], False),
        (["m>=0.5", "m<=last+1"], False),
        (["m>=best"], True),
        (["m<mean"], True),
        (["m>=last", "m>=mean-1"], True),
    ],
)
def test_best_and_mean_need_every_checkpoint(texts: list[str], expected: bool) -> None:
    assert needs_all([parse_requirement(text) for text in texts]) is expected


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        ("m>=last", 2.0),
        ("m<=last", 2.0),
        ("m<=last-saved", 7.0),
        ("m>=last-saved-0.5", 6.5),
        ("m>=best", 4.0),
        ("m>best", 4.0),
        ("m<=best", 1.0),
        ("m<best", 1.0),
        ("m>=mean", 2.5),
        ("m<=mean", 2.5),
        ("m>=best-0.5", 3.5),
        ("m<=best+0.5", 1.5),
        ("m>=mean + 1", 3.5),
        ("m>=0.25", 0.25),
        ("m<=-0.25", -0.25),
    ],
)
def test_what_it_is_held_against(text: str, threshold: float) -> None:
    """``best`` is the highest for ``>=`` and the lowest for ``<=``; ``last`` is the last one, refreshed or not."""
    assert held(text, 0.0, 1.0, 4.0, 3.0, 2.0, saved=7.0).threshold == threshold


@pytest.mark.parametrize(
    ("operator", "below", "equal", "above"),
    [(">=", False, True, True), (">", False, False, True), ("<=", True, True, False), ("<", True, False, False)],
)
def test_equal_values(operator: str, below: bool, equal: bool, above: bool) -> None:
    """Only ``>=`` and ``<=`` are met by the very same number; one unit in the last place decides."""
    at = 0.1 + 0.2
    values = (math.nextafter(at, -INF), at, math.nextafter(at, INF))
    assert [held(f"m{operator}last", value, at).met for value in values] == [below, equal, above]


@pytest.mark.parametrize("reference", ["last", "best", "mean", "0.5"])
@pytest.mark.parametrize("operator", [">=", ">", "<=", "<"])
def test_nan_of_the_average_meets_nothing(operator: str, reference: str) -> None:
    assert not held(f"m{operator}{reference}", NAN, 0.5, 0.5).met


@pytest.mark.parametrize("reference", ["last", "best", "mean"])
@pytest.mark.parametrize("operator", [">=", ">", "<=", "<"])
def test_nothing_is_met_where_all_checkpoints_are_nan(operator: str, reference: str) -> None:
    assert not held(f"m{operator}{reference}", 0.5, NAN, NAN).met


def test_best_leaves_nan_out() -> None:
    """One diverged checkpoint must neither open the gate nor close it for good."""
    assert held("m>=best", 3.0, NAN, 3.0, 1.0).threshold == 3.0
    assert held("m<=best", 1.0, 3.0, NAN, 1.0, NAN).threshold == 1.0


def test_mean_and_last_with_nan_are_not_met() -> None:
    assert not held("m>=mean", 9.0, NAN, 1.0).met
    assert not held("m>=last", 9.0, 1.0, NAN).met


def test_infinite_measurements() -> None:
    """A perplexity may be infinite: that is a number like others."""
    assert held("m<=last", 5.0, INF).met
    assert held("m<=best", 5.0, INF, 6.0).threshold == 6.0
    assert not held("m<=best", 7.0, INF, 6.0).met
    assert held("m<=mean", 5.0, INF, 6.0).met
    assert not held("m>=mean", 5.0, INF, 6.0).met


@pytest.mark.parametrize("values", [(INF, -INF), (1.7e308, 1.7e308)], ids=["inf and -inf", "sum overflows"])
def test_a_mean_that_overflows_is_no_crash(values: tuple[float, float]) -> None:
    """The requirement is not met or is; it does not end in a traceback after the averaging is done."""
    assert held("m>=mean", 1.0, *values).met is False


def test_each_requirement_in_its_order() -> None:
    texts = ["m>=last", "m<=0", "m>=best", "m>=last"]
    compared = measured(3.0, 1.0)
    requirements = [parse_requirement(text) for text in texts]
    found = outcomes(requirements, Evaluation("a", None, {"m": 2.0}), compared, compared[-1])
    assert [(each.requirement.text, each.met) for each in found] == [
        ("m>=last", True),
        ("m<=0", False),
        ("m>=best", False),
        ("m>=last", True),
    ]


def test_the_words_of_an_outcome_have_the_digits_that_tell() -> None:
    """Two numbers that differ in the last place must not look equal where the message says that one is less."""
    outcome = held("m>=last", 0.3, 0.1 + 0.2)
    assert str(outcome) == "m>=last: expected >= 0.30000000000000004, got 0.3"
    assert not outcome.met
    assert str(held("m>=last", 1 / 3, 0.5)) == "m>=last: expected >= 0.5, got 0.333333"
