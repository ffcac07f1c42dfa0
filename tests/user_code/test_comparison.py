"""Better, worse, or within the spread: what is said of a difference."""

from __future__ import annotations

import math

import pytest

from ckpt_avg.user_code.comparison import Change, Evaluation, compare, helped, higher_is_better, mean_of, spread_of


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("accuracy", True),
        ("val/top1", True),
        ("valAcc", True),
        ("mean_IoU", True),
        ("mIoU", True),
        ("mAP50", True),
        ("top-5", True),
        ("acc@1", True),
        ("top-1 error", None),
        ("loss", False),
        ("val-loss", False),
        ("WER", False),
        ("rmse", False),
        ("perplexity", False),
        ("score", None),
        ("lossless", None),
        ("accuracy_loss", None),
        ("", None),
        ("top1-acc", True),
        ("error_rate", False),
        *((name, None) for name in ("neg_loss", "-loss", "- loss", "neg_mean_squared_error", "inv_loss", "1-acc")),
        *((name, None) for name in ("1 - wer", "1/loss", "loss_improvement", "error_reduction", "accuracy drop")),
    ],
)
def test_which_names_tell_the_direction(metric: str, higher: bool | None) -> None:
    """Whole words only: a name that tells nothing, or both, gets no verdict."""
    assert higher_is_better(metric) is higher


def change(metric: str, before: tuple[float, ...], after: tuple[float, ...], **directions: bool) -> Change:
    sides = []
    for values in (before, after):
        samples = {metric: values} if len(values) > 1 else {}
        sides.append(Evaluation("", None, {metric: sum(values) / len(values)}, False, samples))
    (found,) = compare(*sides, directions)
    return found


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("loss", (2.0,), (1.0,), "better"),
        ("loss", (1.0,), (2.0,), "worse"),
        ("accuracy", (1.0,), (2.0,), "better"),
        ("accuracy", (1.0,), (1.0,), "equal"),
        ("m", (1.0,), (1.0,), "equal"),
        ("m", (1.0,), (2.0,), ""),
        ("loss", (1.0,), (math.nan,), "not a number"),
        ("loss", (math.inf,), (math.inf,), "not a number"),
        ("loss", (math.inf,), (1.0,), "better"),
        # The spread is that of the paired differences, not of either side.
        ("loss", (1.0, 5.0, 9.0), (0.9, 4.8, 8.9), "better"),
        ("loss", (1.0, 5.0, 9.0), (0.0, 5.0, 9.5), "within the spread"),
        ("m", (1.0, 5.0, 9.0), (0.0, 5.0, 9.5), "within the spread"),
        ("loss", (1.0, 2.0), (1.0, math.nan), "not a number"),
    ],
)
def test_what_is_said_of_a_difference(
    metric: str, before: tuple[float, ...], after: tuple[float, ...], verdict: str
) -> None:
    assert change(metric, before, after).verdict == verdict


def test_a_requirement_tells_the_direction_of_its_metric() -> None:
    """It overrules what the name suggests."""
    assert change("m", (1.0,), (2.0,), m=True).verdict == "better"
    assert change("loss", (1.0,), (2.0,), loss=True).verdict == "better"


def test_the_spread_is_the_sample_standard_deviation() -> None:
    found = change("m", (1.0, 2.0, 4.0), (2.0, 4.0, 7.0))
    assert (found.difference, found.spread) == (2.0, 1.0)
    assert change("m", (1.0,), (2.0,)).spread is None


@pytest.mark.parametrize("number", [2, 3, 7, 10])
def test_equal_numbers_have_that_mean_and_no_spread(number: int) -> None:
    """A sum that rounds at each step, divided, is not always the number."""
    assert (mean_of([0.1] * number), spread_of([0.1] * number)) == (0.1, 0.0)
    assert mean_of([1.7e308] * number) == 1.7e308
    assert math.isnan(mean_of([math.inf, -math.inf] * number))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["better", "better"], True),
        (["better", "equal", ""], True),
        (["better", "worse"], None),
        (["worse"], False),
        (["equal"], False),
        (["within the spread", "equal"], False),
        (["within the spread", ""], None),
        (["worse", ""], None),
        (["", "not a number"], None),
    ],
)
def test_whether_it_helped(verdicts: list[str], expected: bool | None) -> None:
    """No word of help where nothing got better, and none against it where a metric of unknown direction changed."""
    assert helped([Change("m", 0.0, None, verdict) for verdict in verdicts]) is expected
