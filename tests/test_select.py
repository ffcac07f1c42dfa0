"""Which of the discovered checkpoints are averaged: include, exclude, every, last, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg import check
from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.select import Selection, select

PATHS = [Path("run") / f"step_{number}.pt" for number in range(1, 11)]


def chosen(selection: Selection) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in select(PATHS, selection)]


def test_everything_by_default() -> None:
    assert select(PATHS, Selection()) == tuple(PATHS)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(last=1), [10]),
        (Selection(last=3), [8, 9, 10]),
        (Selection(last=10), list(range(1, 11))),
        (Selection(every=1), list(range(1, 11))),
        (Selection(every=3), [1, 4, 7, 10]),
        (Selection(every=4), [2, 6, 10]),
        (Selection(every=10), [10]),
        (Selection(every=99), [10]),
        (Selection(every=3, last=2), [7, 10]),
        (Selection(include=("step_1*",)), [1, 10]),
        (Selection(include=("step_1.pt", "step_3.pt")), [1, 3]),
        (Selection(include=("step_[2-5].pt",)), [2, 3, 4, 5]),
        (Selection(exclude=("step_10.pt",)), list(range(1, 10))),
        (Selection(exclude=("step_10.pt", "step_?.pt"), include=("*",)), None),
        (Selection(include=("step_?.pt",), exclude=("step_[13579].pt",)), [2, 4, 6, 8]),
        (Selection(include=("step_?.pt",), every=2), [1, 3, 5, 7, 9]),
        (Selection(exclude=("step_10.pt",), every=4, last=2), [5, 9]),
        (Selection(include=("STEP_1.PT",)), None),
        (Selection(include=("run/*",)), None),
    ],
)
def test_the_rules(selection: Selection, expected: list[int] | None) -> None:
    """``every`` counts back from the last, which is always taken; patterns match file names and their case."""
    if expected is None:
        with pytest.raises(IncompatibleError):
            select(PATHS, selection)
    else:
        assert chosen(selection) == expected


@given(st.integers(1, 15), st.integers(1, 15))
def test_every_and_last_agree_with_counting_from_the_end(every: int, last: int) -> None:
    kept = [number for number in range(1, 11) if (10 - number) % every == 0]
    if last > len(kept):
        with pytest.raises(IncompatibleError):
            chosen(Selection(every=every, last=last))
    else:
        assert chosen(Selection(every=every, last=last)) == kept[-last:]


def test_the_order_given_is_kept() -> None:
    """Files named by hand are not sorted."""
    paths = [PATHS[4], PATHS[0], PATHS[9]]
    assert select(paths, Selection(last=2)) == (PATHS[0], PATHS[9])


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("option", ["last", "every"])
def test_numbers_below_one_are_refused(option: str, number: int) -> None:
    with pytest.raises(UsageError) as caught:
        select(PATHS, Selection(**{option: number}))
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"--{option}: expected 1 or more, got {number}."


def test_more_than_there_are() -> None:
    with pytest.raises(IncompatibleError) as caught:
        select(PATHS[:2], Selection(last=3))
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        "--last 3: expected at least that many checkpoints, got 2 (step_1.pt, step_2.pt). "
        "Ask for --last 2 or name more."
    )


def test_more_than_every_leaves() -> None:
    with pytest.raises(IncompatibleError, match=r"--last 5: expected .* got 4 \(step_1.pt, step_4.pt, step_7.pt"):
        chosen(Selection(every=3, last=5))


def test_nothing_left() -> None:
    paths = [Path(f"step_{number}.pt") for number in range(25)]
    with pytest.raises(IncompatibleError) as caught:
        select(paths, Selection(include=("epoch_*",)))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert message.startswith("nothing to average: --include and --exclude leave none of 25 checkpoints (step_0.pt, ")
    assert "step_19.pt, … and 5 more" in message
    assert "The patterns are matched with file names" in message


def test_a_single_pattern_may_be_given_as_it_is(run_folder: Path) -> None:
    """Taken letter by letter, its star would match every checkpoint."""
    report = check(run_folder, include="epoch_1[0-3]*")
    assert [Path(path).name for path in report.checkpoints] == [f"epoch_{number}.pt" for number in (10, 11, 12, 13)]
