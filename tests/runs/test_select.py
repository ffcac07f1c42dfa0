"""Which of the candidates are averaged: names, steps, cycles of the learning rate, every, last, best, in this order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg import check
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, UsageError
from ckpt_avg.runs.candidates import Candidate
from ckpt_avg.runs.select import Selection, check_selection, patterns, select

Rates = tuple[tuple[int, float], ...]


def candidate(name: str, **recorded: Any) -> Candidate:
    """A checkpoint of which only its record counts here."""
    path = Path("run") / name
    return Candidate(path, None, CheckpointFormatError(f"{path}: not opened"), Record(**recorded))


TEN = [candidate(f"step_{number}.pt", step=number) for number in range(1, 11)]


def numbers(chosen: Sequence[Candidate]) -> list[int]:
    return [int(each.path.stem.rpartition("_")[2]) for each in chosen]


def chosen(selection: Selection, candidates: Sequence[Candidate] = TEN) -> list[int]:
    return numbers(select(candidates, selection))


def refusal(kind: type[CkptAvgError], candidates: Sequence[Candidate], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        select(candidates, Selection(**options))
    assert type(caught.value) is kind
    assert caught.value.exit_code == {UsageError: 2, IncompatibleError: 4}[kind]
    return str(caught.value)


def notices(candidates: Sequence[Candidate], **options: Any) -> list[str]:
    told: list[str] = []
    select(candidates, Selection(**options), told.append)
    return told


def test_everything_by_default() -> None:
    assert select(TEN, Selection()) == tuple(TEN)
    assert notices(TEN) == []


# --- every and last ----------------------------------------------------------------------------------------


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
        (Selection(from_step=3), list(range(3, 11))),
        (Selection(to_step=3), [1, 2, 3]),
        (Selection(from_step=3, to_step=3), [3]),
        (Selection(from_step=0, to_step=99), list(range(1, 11))),
        (Selection(to_step=9, every=4, last=2), [5, 9]),
        (Selection(from_step=2, to_step=8, every=3), [2, 5, 8]),
    ],
)
def test_the_rules(selection: Selection, expected: list[int]) -> None:
    """``every`` counts back from the last that is left, which is always taken; bounds are included."""
    assert chosen(selection) == expected


@given(st.integers(1, 15), st.integers(1, 15))
def test_every_and_last_agree_with_counting_from_the_end(every: int, last: int) -> None:
    kept = [number for number in range(1, 11) if (10 - number) % every == 0]
    if last > len(kept):
        with pytest.raises(IncompatibleError):
            chosen(Selection(every=every, last=last))
    else:
        assert chosen(Selection(every=every, last=last)) == kept[-last:]


@given(
    first=st.none() | st.integers(0, 12),
    after=st.none() | st.integers(0, 12),
    every=st.integers(1, 4),
    best=st.none() | st.integers(1, 10),
)
def test_the_rules_apply_one_after_the_other(
    first: int | None, after: int | None, every: int, best: int | None
) -> None:
    """Each looks only at what the one before it left, and none changes the order."""
    last = None if after is None else (first or 0) + after
    measured = [candidate(f"step_{n}.pt", step=n, metrics={"loss": float((7 * n) % 11)}) for n in range(1, 11)]
    kept = [n for n in range(1, 11) if (first is None or n >= first) and (last is None or n <= last)]
    counted = kept[::-1][::every][::-1]
    mode = None if best is None else "min"
    selection = Selection(from_step=first, to_step=last, every=every, best=best, mode=mode)
    if not counted or (best is not None and best > len(counted)):
        with pytest.raises(IncompatibleError):
            chosen(selection, measured)
    else:
        expected = counted if best is None else sorted(sorted(counted, key=lambda n: (7 * n) % 11)[:best])
        assert chosen(selection, measured) == expected


def test_the_order_given_is_kept() -> None:
    """Files named by hand are not sorted."""
    candidates = [TEN[4], TEN[0], TEN[9]]
    assert select(candidates, Selection(last=2)) == (TEN[0], TEN[9])
    assert select(candidates, Selection(from_step=1, to_step=5)) == (TEN[4], TEN[0])


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("option", ["last", "every", "best"])
def test_numbers_below_one_are_refused(option: str, number: int) -> None:
    assert refusal(UsageError, TEN, **{option: number}) == f"--{option}: expected 1 or more, got {number}."


def test_more_than_there_are() -> None:
    assert refusal(IncompatibleError, TEN[:2], last=3) == (
        "--last 3: expected at least that many checkpoints, got 2 (step_1.pt, step_2.pt). "
        "Ask for --last 2 or name more."
    )


def test_more_than_every_leaves() -> None:
    message = refusal(IncompatibleError, TEN, every=3, last=5)
    assert message.startswith("--last 5: expected at least that many checkpoints, got 4 (step_1.pt, step_4.pt, ")


# --- include and exclude -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), list(range(1, 11))),
        (Selection(include=("step_1*",)), [1, 10]),
        (Selection(include=("step_1.pt", "step_3.pt")), [1, 3]),
        (Selection(include=("step_[2-5].pt",)), [2, 3, 4, 5]),
        (Selection(exclude=("step_10.pt",)), list(range(1, 10))),
        (Selection(exclude=("step_10.pt", "step_?.pt"), include=("*",)), []),
        (Selection(include=("step_?.pt",), exclude=("step_[13579].pt",)), [2, 4, 6, 8]),
        (Selection(include=("STEP_1.PT",)), []),
        (Selection(include=("run/*",)), []),
        (Selection(include=("step_1",)), []),
        (Selection(include=("step_?.pt",), every=2, last=1), list(range(1, 10))),
    ],
)
def test_patterns_let_names_through(selection: Selection, expected: list[int]) -> None:
    """They match whole file names, their case included; no other rule has a say in it."""
    assert numbers([each for each in TEN if selection.wants(each.path.name)]) == expected


def test_a_single_pattern_may_be_given_as_it_is(run_folder: Path) -> None:
    """Taken letter by letter, its star would match every checkpoint."""
    assert patterns("a*") == ("a*",)
    assert patterns(["a*", "b"]) == ("a*", "b")
    report = check(run_folder, include="epoch_1[0-3]*")
    assert [Path(path).name for path in report.checkpoints] == [f"epoch_{number}.pt" for number in (10, 11, 12, 13)]


def test_names_come_before_the_other_rules(run_folder: Path) -> None:
    """``--every 4 --last 2`` of what the patterns leave, not the other way round."""
    report = check(run_folder, exclude="epoch_20*", every=4, last=2)
    assert [Path(path).name for path in report.checkpoints] == ["epoch_15.pt", "epoch_19.pt"]


# --- from and to -------------------------------------------------------------------------------------------

EPOCHS = [candidate(f"epoch_{number}.pt", epoch=number) for number in range(3, 8)]


def test_steps_go_before_epochs() -> None:
    both = [candidate(f"x_{number}.pt", step=100 * number, epoch=number) for number in (1, 2, 3)]
    assert chosen(Selection(from_step=200), both) == [2, 3]
    assert notices(both, from_step=200) == []


def test_epochs_serve_where_there_are_no_steps_and_that_is_said() -> None:
    assert chosen(Selection(from_step=4, to_step=6), EPOCHS) == [4, 5, 6]
    assert notices(EPOCHS, from_step=4, to_step=6) == ["the run records no steps, so 4 to 6 are epochs"]
    assert notices(EPOCHS, to_step=6) == ["the run records no steps, so 0 to 6 are epochs"]
    assert notices(EPOCHS, from_step=4) == ["the run records no steps, so 4 to … are epochs"]


def test_one_checkpoint_without_a_step_makes_them_epochs() -> None:
    """Steps of some and epochs of others cannot be compared."""
    mixed = [candidate("x_1.pt", step=500, epoch=1), candidate("x_2.pt", epoch=2), candidate("x_3.pt", step=9, epoch=3)]
    assert chosen(Selection(from_step=2), mixed) == [2, 3]


def test_the_step_zero_is_a_step() -> None:
    zero = [candidate("x_0.pt", step=0), candidate("x_1.pt", step=1)]
    assert chosen(Selection(to_step=0), zero) == [0]
    assert chosen(Selection(from_step=0), zero) == [0, 1]


@pytest.mark.parametrize("option", ["from_step", "to_step"])
def test_neither_steps_nor_epochs(option: str) -> None:
    lacking = [*TEN[:2], candidate("final.pt"), candidate("extra.pt", epoch=3)]
    message = refusal(IncompatibleError, lacking, **{option: 1})
    assert message.startswith(
        f"--{option.replace('_', '-')}: expected a step or an epoch for every checkpoint, got none"
    )
    assert "final.pt" in message
    assert "step_1.pt" not in message
    assert message.endswith("Leave these out with --exclude, or choose with --include.")


def test_nothing_between() -> None:
    message = refusal(IncompatibleError, TEN, from_step=11)
    assert message == (
        "nothing to average: none of 10 checkpoints lies in steps 11 to …; they lie in 1 to 10. "
        "Change --from-step or --to-step."
    )
    assert "epochs 0 to 2; they lie in 3 to 7" in refusal(IncompatibleError, EPOCHS, to_step=2)


def test_bounds_in_the_wrong_order() -> None:
    message = refusal(UsageError, TEN, from_step=5, to_step=4)
    assert message == "--from-step 5 lies behind --to-step 4: expected it before."


# --- best --------------------------------------------------------------------------------------------------


def measured(values: Mapping[int, float | None], name: str = "loss") -> list[Candidate]:
    return [
        candidate(f"step_{number}.pt", step=number, metrics={} if value is None else {name: value})
        for number, value in values.items()
    ]


LOSSES = measured({1: 0.5, 2: 0.1, 3: 0.9, 4: 0.2, 5: 0.3})


@pytest.mark.parametrize(
    ("best", "mode", "expected"),
    [(1, "min", [2]), (2, "min", [2, 4]), (3, "min", [2, 4, 5]), (1, "max", [3]), (2, "max", [1, 3]), (5, "max", None)],
)
def test_the_best_in_the_order_of_the_run(best: int, mode: str, expected: list[int] | None) -> None:
    """Not in the order of the metric: the last of them decides, for example, with ``--non-float last``."""
    assert chosen(Selection(best=best, mode=mode, metric="loss"), LOSSES) == (expected or [1, 2, 3, 4, 5])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equals_the_later_ones_are_taken(mode: str) -> None:
    equal = measured(dict.fromkeys(range(1, 6), 0.5))
    assert chosen(Selection(best=2, mode=mode), equal) == [4, 5]


@given(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0, 1e300]), min_size=1, max_size=8), st.data())
def test_none_that_is_left_out_is_better(values: list[float], data: st.DataObject) -> None:
    best = data.draw(st.integers(1, len(values)))
    mode = data.draw(st.sampled_from(["min", "max"]))
    runs = measured(dict(enumerate(values)))
    taken = chosen(Selection(best=best, mode=mode), runs)
    assert taken == sorted(taken)
    assert len(taken) == best
    sign = 1 if mode == "min" else -1
    out = [index for index in range(len(values)) if index not in taken]
    assert all(
        (sign * values[inside], -inside) < (sign * values[outside], -outside) for inside in taken for outside in out
    )


def test_the_only_metric_needs_no_name() -> None:
    assert chosen(Selection(best=1, mode="min"), LOSSES) == [2]


def test_several_metrics_must_be_told_apart() -> None:
    two = [candidate("step_1.pt", metrics={"loss": 0.1}), candidate("step_2.pt", metrics={"acc": 0.9})]
    message = refusal(IncompatibleError, two, best=1, mode="min")
    assert message == (
        "--best 1: expected a name for --metric, got checkpoints that record 'acc', 'loss'. Name one of these."
    )


def test_a_metric_that_no_checkpoint_records() -> None:
    message = refusal(IncompatibleError, LOSSES, best=1, mode="min", metric="los")
    assert "expected --metric los, got checkpoints that record 'loss'" in message
    for metric in (None, "loss"):
        message = refusal(IncompatibleError, TEN, best=1, mode="min", metric=metric)
        assert "got checkpoints that record no metric at all" in message


def test_checkpoints_that_lack_the_metric_are_left_out_and_said() -> None:
    some = measured({1: 0.5, 2: None, 3: 0.9, 4: None})
    assert chosen(Selection(best=2, mode="max"), some) == [1, 3]
    assert notices(some, best=1, mode="max") == ["left out, since they record no 'loss': step_2.pt, step_4.pt"]
    message = refusal(IncompatibleError, some, best=3, mode="max")
    assert message == (
        "--best 3: expected at least that many checkpoints, got 2 (step_1.pt, step_3.pt). "
        "Ask for --best 2 or name more."
    )


def test_the_best_of_what_the_other_rules_leave() -> None:
    assert chosen(Selection(best=1, mode="min", from_step=3), LOSSES) == [4]
    assert chosen(Selection(best=1, mode="min", last=1), LOSSES) == [5]


@pytest.mark.parametrize("mode", [None, "lowest", "MIN", ""])
def test_what_is_better_must_be_said(mode: str | None) -> None:
    """Guessing that low is good would average the worst checkpoints by accuracy."""
    message = refusal(UsageError, LOSSES, best=1, metric="loss", mode=mode)
    assert "expected --mode min (a loss, an error rate) or --mode max (an accuracy), got" in message


@pytest.mark.parametrize(("option", "value"), [("metric", "loss"), ("mode", "min")])
def test_a_metric_without_best(option: str, value: str) -> None:
    message = refusal(UsageError, LOSSES, **{option: value})
    assert message == f"--{option} {value}: says what is best, but nothing asks for the best. Add --best N."


def test_the_wording_can_be_checked_before_any_file_is_looked_at() -> None:
    check_selection(Selection(best=1, mode="max", last=3, every=2, from_step=3, to_step=3, at_lr_minima=True))
    with pytest.raises(UsageError):
        check_selection(Selection(best=1))


# --- the bottoms of the learning rate's cycles -------------------------------------------------------------


def cyclic(step: int, period: int = 10) -> float:
    """Falls over ``period`` steps, then jumps back; lowest at the last step of each cycle."""
    return 0.1 - 0.09 * (step % period) / (period - 1)


LOG: Rates = tuple((step, cyclic(step)) for step in range(41))


def logged(*steps: int, log: Rates = LOG) -> list[Candidate]:
    """Checkpoints of a trainer that keeps a log: each holds it up to its own step."""
    return [
        candidate(f"step_{step}.pt", step=step, learning_rate=cyclic(step), rates=tuple(x for x in log if x[0] <= step))
        for step in steps
    ]


def test_the_bottoms_by_the_log() -> None:
    """The log knows the cycles where checkpoints are too rare to show them."""
    assert chosen(Selection(at_lr_minima=True), logged(4, 9, 14, 19, 24, 29, 30)) == [9, 19, 29]
    assert chosen(Selection(at_lr_minima=True), logged(9, 14, 19, 33)) == [9, 19]


def test_the_checkpoint_nearest_to_a_bottom_is_taken_if_it_is_near() -> None:
    """A quarter of a cycle is near: saved right after the rate has jumped still is the end of that cycle."""
    assert chosen(Selection(at_lr_minima=True), logged(5, 10, 15, 20, 25, 30)) == [10, 20, 30]
    assert chosen(Selection(at_lr_minima=True), logged(4, 9, 14, 24, 29, 30)) == [9, 29]
    assert "at least twice" in refusal(IncompatibleError, logged(4, 14, 24, 30), at_lr_minima=True)


def test_the_bottoms_by_the_rates_that_the_checkpoints_hold() -> None:
    """For trainers without a log; here the order of the checkpoints is all that is needed."""
    rates = [0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1]
    bare = [candidate(f"x_{index}.pt", learning_rate=rate) for index, rate in enumerate(rates)]
    assert chosen(Selection(at_lr_minima=True), bare) == [2, 5]


def test_a_log_without_steps_of_the_checkpoints_is_no_help() -> None:
    rates = [0.1, 0.01, 0.1, 0.01, 0.1]
    bare = [candidate(f"x_{index}.pt", learning_rate=rate, rates=LOG) for index, rate in enumerate(rates)]
    assert chosen(Selection(at_lr_minima=True), bare) == [1, 3]


def test_bottoms_are_looked_for_between_the_bounds() -> None:
    assert chosen(Selection(at_lr_minima=True, from_step=12), logged(9, 14, 19, 24, 29, 30)) == [19, 29]
    assert chosen(Selection(at_lr_minima=True, last=2), logged(9, 14, 19, 24, 29, 30)) == [19, 29]


def test_a_checkpoint_without_a_rate() -> None:
    some = [candidate("x_1.pt", learning_rate=0.1), candidate("x_2.pt"), candidate("x_3.pt", learning_rate=0.1)]
    message = refusal(IncompatibleError, some, at_lr_minima=True)
    assert message.startswith("--at-lr-minima: expected a learning rate in every checkpoint, got none in x_2.pt.")


@pytest.mark.parametrize("rates", [[0.1], [0.1] * 5, [0.1, 0.08, 0.06, 0.04], [0.01, 0.1, 0.05, 0.01], [0.2, 0.1, 0.3]])
def test_a_rate_without_cycles_is_refused(rates: list[float]) -> None:
    """Constant, falling, warmed up, or with one bottom only: there are no cycles to choose by."""
    bare = [candidate(f"x_{index}.pt", step=index, learning_rate=rate) for index, rate in enumerate(rates)]
    message = refusal(IncompatibleError, bare, at_lr_minima=True)
    assert "expected a learning rate that falls and rises again at least twice, got" in message
    assert f"{rates[0]:g}" in message
    log = tuple(enumerate(rates))
    bare = [candidate(f"x_{step}.pt", step=step, rates=log[: step + 1]) for step, _ in log]
    assert "at least twice" in refusal(IncompatibleError, bare, at_lr_minima=True)


def test_of_two_as_near_to_a_bottom_the_later_is_taken() -> None:
    """The later one has been trained longer in that cycle; the earlier would be taken for the order of a list."""
    assert chosen(Selection(at_lr_minima=True), logged(8, 10, 18, 20, 28, 30)) == [10, 20, 30]


BEHIND = "each is followed by a checkpoint that records the highest rate"


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([0.01, 0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1], True),  # each bottom is the last before a restart
        ([0.05, 0.01, 0.1, 0.05, 0.01, 0.096, 0.05], True),  # within 5 %
        ([0.05, 0.01, 0.1, 0.05, 0.01, 0.09, 0.05], False),
        ([0.1, 0.05, 0.01, 0.05, 0.1, 0.05, 0.01, 0.05, 0.1], False),  # triangles
    ],
)
def test_bottoms_before_the_highest_rate_are_doubted(rates: list[float], told: bool) -> None:
    """A scheduler that stepped before the checkpoint was saved shows the next rate: then the tops are the ends."""
    bare = [candidate(f"x_{index}.pt", learning_rate=rate) for index, rate in enumerate(rates)]
    assert any(BEHIND in text for text in notices(bare, at_lr_minima=True)) is told


def test_bottoms_by_the_log_are_not_doubted() -> None:
    """A log says at which step each rate was."""
    assert not any(BEHIND in text for text in notices(logged(9, 10, 19, 20, 29, 30), at_lr_minima=True))
