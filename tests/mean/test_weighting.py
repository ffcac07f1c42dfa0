"""Which weights checkpoints get: by steps, epochs or positions; and what cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.mean.weight_formulas import decay_weights, ema_weights, exponent_of, power_weights
from ckpt_avg.mean.weighting import Moments, Weighting, choose_weights, summed

UNEVEN = [0, 100, 200, 1000]


def chosen(steps: Sequence[int] | None, count: int | None = None, **options: Any) -> list[float] | None:
    """The weights of checkpoints at these steps; None if all are equal."""
    places = options.pop("places", None)
    when = {name: options.pop(name) for name in ("before", "unit", "is_in_steps") if name in options}
    moments = None if steps is None else Moments(tuple(steps), **when)
    number = len(steps or ()) if count is None else count
    paths = [Path(f"{index}.pt") for index in range(number)]
    found = choose_weights(Weighting(**options), paths, moments, places=places)
    return None if found is None else list(found.values)


# -- Steps and positions ----------------------------------------------------------------------------------------------


def test_steps_count_where_all_record_them() -> None:
    assert chosen(UNEVEN, weighting="minus-sqrt") == decay_weights(UNEVEN, "minus-sqrt")
    assert chosen(UNEVEN, weighting="minus-sqrt", weighting_by="index") == decay_weights(range(4), "minus-sqrt")
    assert chosen(None, 4, weighting="minus-sqrt") == decay_weights(range(4), "minus-sqrt")


def test_that_steps_are_missing_is_said() -> None:
    notices: list[str] = []
    paths = [Path("a.pt"), Path("b.pt")]
    choose_weights(Weighting(weighting="cosine"), [*paths, Path("c.pt")], None, notice=notices.append)
    choose_weights(Weighting(weighting="cosine"), paths, Moments((1, 2)), notice=notices.append)
    choose_weights(Weighting(weighting="cosine"), paths, Moments((1, 2), unit="epoch"), notice=notices.append)
    assert notices == [
        "--weighting cosine: not every checkpoint records a step or an epoch, so they are taken as evenly spaced",
        "--weighting cosine: the run records no steps, so its epochs are used",
    ]


def test_power_by_position_counts_from_the_start_of_the_run() -> None:
    """As if its checkpoints were evenly spaced from the start of the training; a window begins where the run was."""
    gamma = exponent_of(0.1)
    found = chosen(None, 3, weighting="power", width=0.1, places=[2, 4, 6])
    assert found == power_weights([3, 5, 7], gamma, before=2)
    assert chosen(None, 3, weighting="power", width=0.1, places=[0, 1, 2]) == power_weights([1, 2, 3], gamma)


@pytest.mark.parametrize(
    ("steps", "before", "is_said"), [([900, 950], 0, True), ([900, 950], 850, False), ([50, 100], 0, False)]
)
def test_that_power_knows_no_checkpoint_before_the_window_is_said(steps: list[int], before: int, is_said: bool) -> None:
    """Listed files may be the end of a run, of which the first then gets the weight of all that is missing."""
    notices: list[str] = []
    paths = [Path("a.pt"), Path("b.pt")]
    choose_weights(Weighting(weighting="power", width=0.1), paths, Moments(tuple(steps), before), notice=notices.append)
    assert [notice.split(", because")[0] for notice in notices] == [
        "--weighting power: a.pt counts for all steps up to its own, 900"
    ] * is_said


@pytest.mark.parametrize("half_life", ["25%", "25 %", 250, "250", 250.0])
def test_a_half_life_in_percent_is_of_the_steps_between_the_first_and_the_last(half_life: Any) -> None:
    found = chosen([1000, 1500, 2000], weighting="ema", half_life=half_life)
    assert found == pytest.approx([1 / 21, 4 / 21, 16 / 21])
    if "%" in str(half_life):
        assert chosen(None, 3, weighting="ema", half_life=half_life) == found


@pytest.mark.parametrize("rule", ["linear", "mean"])
def test_equal_weights_are_no_weights(rule: str) -> None:
    """So that the mean divides, and the file is the same."""
    assert chosen([10, 20, 30], weighting=rule) is None
    assert chosen(None, 7, weighting=rule) is None


@pytest.mark.parametrize(
    "options",
    [{"weighting": "minus-sqrt"}, {"weighting": "ema", "half_life": 5}, {"weighting": "power", "width": 0.1}],
    ids=lambda options: options["weighting"],
)
def test_one_checkpoint_has_all_the_weight(options: dict[str, Any]) -> None:
    assert chosen([7], **options) is None
    assert chosen(None, 1, **options) is None


def test_a_checkpoint_of_no_weight_is_not_summed() -> None:
    assert summed([0, 1, 2], None) == ([0, 1, 2], None)
    assert summed([2, 1, 0], [0.25, 0.0, 0.75]) == ([2, 0], (0.75, 0.25))
    assert summed([0, 1, 2], [0.5, 0.0, 0.5]) == ([0, 2], None)  # the mean of the others, which divides
    assert summed([0, 1], [0.0, 1.0]) == ([1], None)


# -- What cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "minus_sqrt"}, "Did you mean 'minus-sqrt'?"),
        ({"weighting": "ema"}, "--weighting ema needs --half-life. Add for example --half-life 1000 (steps), or 10%."),
        ({"weighting": "power"}, "--weighting power needs --width. Add for example --width 0.1."),
        ({"weighting": "power", "half_life": 10, "width": 0.1}, "--half-life 10 needs --weighting ema. Add it, or rem"),
        ({"half_life": "10%"}, "--half-life 10% needs --weighting ema."),
        ({"width": 0.1}, "--width 0.1 needs --weighting power."),
        ({"weighting": "power", "width": 0.2887}, "--width 0.2887: no power has this width. Use 1e-06 or more, and le"),
        ({"weighting": "power", "width": 0.0}, "--width 0: no power has this width."),
        ({"weighting": "power", "width": math.nan}, "--width nan: no power has this width."),
        ({"weighting": "ema", "half_life": "soon"}, "--half-life: 'soon' is no half-life. Write for example 1000 (st"),
        ({"weighting": "ema", "half_life": "0"}, "--half-life: '0' is no half-life."),
        ({"weighting": "ema", "half_life": "1e-320%"}, "--half-life: '1e-320%' is no half-life."),
        ({"weighting": "ema", "half_life": "-5%"}, "--half-life: '-5%' is no half-life."),
        ({"weighting": "ema", "half_life": math.inf}, "--half-life: 'inf' is no half-life."),
        ({"weighting": "ema", "half_life": "nan"}, "--half-life: 'nan' is no half-life."),
        ({"weighting_by": "index"}, "--weighting-by index needs another --weighting than mean."),
        ({"weights": "1,2", "weighting": "cosine"}, "--weights and --weighting cosine: both choose weights."),
        ({"normalize": True}, "--normalize needs --weights."),
    ],
    ids=str,
)
def test_options_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Weighting(**options)
    assert message in str(caught.value)


EMA = {"weighting": "ema", "half_life": 100}


@pytest.mark.parametrize(
    ("options", "steps", "error", "message"),
    [
        (
            {"weighting": "cosine"},
            [1, 2, 2],
            IncompatibleError,
            "expected steps that increase, got '1.pt' (2), '2.pt' ",
        ),
        (EMA, [1, 2, 2], IncompatibleError, "Skip one of these with --exclude, or use --weighting-by index."),
        (
            {"weighting": "linear", "weighting_by": "step"},
            None,
            IncompatibleError,
            "expected a step or an epoch in every",
        ),
        (
            EMA,
            None,
            IncompatibleError,
            "--half-life 100 counts steps, and not every checkpoint records one: 0.pt, 1.pt",
        ),
        ({**EMA, "weighting_by": "index"}, [1, 2, 3], UsageError, "and --weighting-by index uses none."),
    ],
    ids=str,
)
def test_steps_that_are_missing_or_equal(
    options: dict[str, Any], steps: list[int] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        chosen(steps, 3, **options)
    assert message in str(caught.value)


def test_a_half_life_in_an_unknown_unit_is_refused_until_the_user_says_that_it_is_steps() -> None:
    """The numbers may be epochs: a half-life of 100 epochs would be nearly the mean, without a word."""
    with pytest.raises(
        IncompatibleError, match=r"unit of the numbers .*, 2\.pt\. If they are steps, add --weighting-by step"
    ):
        chosen([1, 2, 3], **EMA, is_in_steps=False)
    assert chosen([1, 2, 3], **EMA, weighting_by="step", is_in_steps=False) == ema_weights([1, 2, 3], 100)
    assert chosen([1, 2, 3], weighting="cosine", is_in_steps=False) == decay_weights([1, 2, 3], "cosine")


def test_a_half_life_counts_epochs_only_if_the_user_says_so() -> None:
    epochs: dict[str, Any] = {"unit": "epoch", "is_in_steps": False}
    with pytest.raises(
        IncompatibleError, match=r"and the checkpoints record only epochs: 0\.pt, .*\. Add --weighting-by st"
    ):
        chosen([1, 2, 3], **EMA, **epochs)
    notices: list[str] = []
    options = Weighting(weighting="ema", half_life=2, weighting_by="step")
    found = choose_weights(options, [Path("a"), Path("b")], Moments((1, 3), **epochs), notice=notices.append)
    assert found is not None
    assert found.values == tuple(ema_weights([1, 3], 2))
    assert notices == [
        "--weighting ema: the run records no steps, so its epochs are used, and --half-life 2 counts epochs"
    ]
