"""Which of the candidates are averaged: names, steps, cycles of the learning rate, every, intervals, last, best.

In this order. What comes from a log is in test_metric_log.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg import check
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, UsageError
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.lr_minima import minima_of
from ckpt_avg.runs.select import select
from ckpt_avg.runs.selection import Selection

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
    found: list[str] = []
    select(candidates, Selection(**options), found.append)
    return found


# --- every and last ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), list(range(1, 11))),
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
        (Selection(min_interval=1), list(range(1, 11))),
        (Selection(min_interval=4), [2, 6, 10]),
        (Selection(min_interval=99), [10]),
        (Selection(to_step=9, every=2, min_interval=3, last=2), [5, 9]),
    ],
)
def test_the_rules(selection: Selection, expected: list[int]) -> None:
    """``every`` counts back from the last remaining one, which is always used; bounds are included."""
    assert chosen(selection) == expected


@given(st.integers(1, 15), st.integers(1, 15))
def test_every_and_last_agree_with_counting_from_the_end(every: int, last: int) -> None:
    kept = [number for number in range(1, 11) if (10 - number) % every == 0]
    if last > len(kept):
        with pytest.raises(IncompatibleError):
            chosen(Selection(every=every, last=last))
    else:
        assert chosen(Selection(every=every, last=last)) == kept[-last:]


def test_an_interval_is_counted_in_steps_back_from_the_last() -> None:
    """Unlike --every it does not depend on how often checkpoints were saved."""
    uneven = [candidate(f"step_{step}.pt", step=step) for step in (100, 190, 200, 290, 300, 301, 400)]
    assert chosen(Selection(min_interval=100), uneven) == [100, 200, 300, 400]
    assert chosen(Selection(min_interval=101), uneven) == [100, 290, 400]
    assert chosen(Selection(min_interval=101, last=2), uneven) == [290, 400]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20, unique=True), st.integers(1, 30))
def test_an_interval_leaves_no_gap_that_another_checkpoint_could_fill(steps: list[int], interval: int) -> None:
    ordered = [candidate(f"step_{step}.pt", step=step) for step in sorted(steps)]
    kept = chosen(Selection(min_interval=interval), ordered)
    assert kept[-1] == max(steps)
    assert all(after - before >= interval for before, after in itertools.pairwise(kept))
    for before, after in itertools.pairwise([-interval, *kept]):
        assert not [step for step in steps if before < step <= after - interval and step not in kept]


def test_an_interval_needs_numbers_that_rise() -> None:
    assert chosen(Selection(min_interval=2), EPOCHS) == [3, 5, 7]
    assert notices(EPOCHS, min_interval=2) == ["--min-interval 2: the run records no steps, so these are epochs"]
    message = refusal(IncompatibleError, [TEN[1], TEN[4], TEN[2]], min_interval=2)
    assert message == (
        "--min-interval 2: expected steps that rise from checkpoint to checkpoint, got 2, 5, 3 in step_2.pt, "
        "step_5.pt, step_3.pt. Use --every or --include instead."
    )
    message = refusal(IncompatibleError, [*TEN[:2], candidate("final.pt")], min_interval=2)
    assert message.startswith("--min-interval 2: expected a step or an epoch in every checkpoint, got none in final.pt")


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
    assert refusal(UsageError, TEN, **{option: number}) == f"--{option}: {number} is out of range. Use 1 or more."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 11}, "--last 11: expected at least 11 checkpoints, got 10 (step_1.pt, step_2.pt, "),
        ({"every": 3, "last": 5}, "--last 5: expected at least 5 checkpoints, got 4 (step_1.pt, step_4.pt, step_7.pt, "
                                  "step_10.pt). Use --last 4, or name more checkpoints."),
        ({"from_step": 11}, "nothing to average: none of 10 checkpoints matches --from-step 11; their steps are 1 to "
                            "10. Choose other bounds."),
    ],
)  # fmt: skip
def test_more_than_there_are(options: dict[str, int], message: str) -> None:
    assert refusal(IncompatibleError, TEN, **options).startswith(message)


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
    """They match complete file names, with their case; the other rules don't matter."""
    assert numbers([each for each in TEN if selection.wants(each.path.name)]) == expected


def test_a_single_pattern_may_be_given_as_it_is(run_folder: Path) -> None:
    """Taken letter by letter, its star would match every checkpoint."""
    assert Selection(include="a*").include == ("a*",)
    assert Selection(exclude=["a*", "b"]).exclude == ("a*", "b")
    report = check(run_folder, include="epoch_1[0-3]*")
    assert [Path(path).name for path in report.checkpoints] == [f"epoch_{number}.pt" for number in (10, 11, 12, 13)]


def test_names_come_before_the_other_rules(run_folder: Path) -> None:
    """``--every 4 --last 2`` apply to the names that match."""
    report = check(run_folder, exclude="epoch_20*", every=4, last=2)
    assert [Path(path).name for path in report.checkpoints] == ["epoch_15.pt", "epoch_19.pt"]


# --- from and to -------------------------------------------------------------------------------------------

EPOCHS = [candidate(f"epoch_{number}.pt", epoch=number) for number in range(3, 8)]


@pytest.mark.parametrize(
    ("recorded", "bounds", "expected"),
    [
        # Steps go before epochs; the step zero is a step.
        ([{"step": 100, "epoch": 1}, {"step": 200, "epoch": 2}, {"step": 300, "epoch": 3}], {"from_step": 200}, [2, 3]),
        ([{"step": 0}, {"step": 1}], {"to_step": 0}, [1]),
        ([{"step": 0}, {"step": 1}], {"from_step": 0}, [1, 2]),
        # Steps of some and epochs of others cannot be compared.
        ([{"step": 500, "epoch": 1}, {"epoch": 2}, {"step": 9, "epoch": 3}], {"from_step": 2}, [2, 3]),
    ],
)
def test_steps_or_epochs(recorded: list[dict[str, int]], bounds: dict[str, int], expected: list[int]) -> None:
    candidates = [candidate(f"x_{number}.pt", **each) for number, each in enumerate(recorded, 1)]
    assert chosen(Selection(**bounds), candidates) == expected


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        ({"from_step": 4, "to_step": 6}, "--from-step 4 --to-step 6"),
        ({"to_step": 6}, "--to-step 6"),
        ({"from_step": 4}, "--from-step 4"),
    ],
)
def test_epochs_count_if_there_are_no_steps(bounds: dict[str, int], shown: str) -> None:
    assert chosen(Selection(**bounds), EPOCHS) == list(range(bounds.get("from_step", 3), bounds.get("to_step", 7) + 1))
    assert notices(EPOCHS, **bounds) == [f"{shown}: the run records no steps, so these are epochs"]
    assert notices(TEN, **bounds) == []


@pytest.mark.parametrize("option", ["from_step", "to_step"])
def test_neither_steps_nor_epochs(option: str) -> None:
    lacking = [*TEN[:2], candidate("final.pt"), candidate("extra.pt", epoch=3)]
    message = refusal(IncompatibleError, lacking, **{option: 1})
    assert message.startswith(
        f"--{option.replace('_', '-')}: expected a step or an epoch in every checkpoint, got none"
    )
    assert "final.pt" in message
    assert "step_1.pt" not in message
    assert message.endswith("Skip these with --exclude, or select others with --include.")


def test_no_epoch_between() -> None:
    message = refusal(IncompatibleError, EPOCHS, to_step=2)
    assert "none of 5 checkpoints matches --to-step 2; their epochs are 3 to 7." in message


def test_bounds_in_the_wrong_order() -> None:
    message = refusal(UsageError, TEN, from_step=5, to_step=4)
    assert message == "--from-step 5 is greater than --to-step 4. Swap them."


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
def test_ties_go_to_the_later_checkpoint(mode: str) -> None:
    equal = measured(dict.fromkeys(range(1, 6), 0.5))
    assert chosen(Selection(best=2, mode=mode), equal) == [4, 5]


@given(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0, 1e300]), min_size=1, max_size=8), st.data())
def test_no_skipped_checkpoint_is_better(values: list[float], data: st.DataObject) -> None:
    best = data.draw(st.integers(1, len(values)))
    mode = data.draw(st.sampled_from(["min", "max"]))
    runs = measured(dict(enumerate(values)))
    used = chosen(Selection(best=best, mode=mode), runs)
    assert used == sorted(used)
    assert len(used) == best
    sign = 1 if mode == "min" else -1
    out = [index for index in range(len(values)) if index not in used]
    assert all(
        (sign * values[inside], -inside) < (sign * values[outside], -outside) for inside in used for outside in out
    )


TWO = [candidate("step_1.pt", metrics={"loss": 0.1}), candidate("step_2.pt", metrics={"acc": 0.9})]


@pytest.mark.parametrize(
    ("candidates", "metric", "message"),
    [
        (TWO, None, "--best 1: the checkpoints record 'acc', 'loss'. Choose one of them with --metric."),
        (LOSSES, "los", "--metric los: the checkpoints record 'loss'. Did you mean 'loss'?"),
        (LOSSES, "f1", "--metric f1: the checkpoints record 'loss'. Use one of these."),
        (TEN, None, "--best 1: the checkpoints record no metrics. Add --log FILE, or use --last or --include."),
        (
            TEN,
            "loss",
            "--best 1: the checkpoints record no metrics. Add --log FILE, or use --last or --include.",
        ),
    ],
)
def test_a_metric_that_is_not_recorded(candidates: list[Candidate], metric: str | None, message: str) -> None:
    assert refusal(IncompatibleError, candidates, best=1, mode="min", metric=metric) == message


def test_checkpoints_without_the_metric_are_skipped_with_a_notice() -> None:
    some = measured({1: 0.5, 2: None, 3: 0.9, 4: None})
    assert chosen(Selection(best=2, mode="max"), some) == [1, 3]
    assert notices(some, best=1, mode="max") == ["skipped, because they record no 'loss': step_2.pt, step_4.pt"]
    message = refusal(IncompatibleError, some, best=3, mode="max")
    assert message == (
        "--best 3: expected at least 3 checkpoints, got 2 (step_1.pt, step_3.pt). "
        "Use --best 2, or name more checkpoints."
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_ranks_nowhere(bad: float) -> None:
    """Whether such a checkpoint is averaged is the user's decision."""
    some = measured({1: 0.5, 2: bad, 3: 0.9, 4: bad})
    assert refusal(IncompatibleError, some, best=2, mode="max") == (
        f"--best 2: expected finite numbers as 'loss', got {bad} in step_2.pt, {bad} in step_4.pt. To rank the others, "
        "add --exclude step_2.pt --exclude step_4.pt."
    )
    assert chosen(Selection(best=1, mode="max", to_step=1), some) == [1]


def test_the_best_of_what_the_other_rules_leave() -> None:
    assert chosen(Selection(best=1, mode="min", from_step=3), LOSSES) == [4]
    assert chosen(Selection(best=1, mode="min", last=1), LOSSES) == [5]
    assert chosen(Selection(best=1, mode="min"), LOSSES) == [2]  # the only metric needs no name


@pytest.mark.parametrize("mode", [None, "lowest", "MIN", ""])
def test_best_needs_a_mode(mode: str | None) -> None:
    """Guessing that low is good would average the worst checkpoints by accuracy."""
    message = refusal(UsageError, LOSSES, best=1, metric="loss", mode=mode)
    if mode is None:
        assert message == "--best 1 needs --mode. Add --mode min (for a loss) or --mode max (for an accuracy)."
    else:
        near = " Did you mean 'min'?" if mode == "MIN" else ""
        assert message == f"--mode: {mode!r} is not one of min, max.{near}"


@pytest.mark.parametrize(("option", "value"), [("metric", "loss"), ("mode", "min"), ("log", "metrics.csv")])
def test_a_metric_without_best(option: str, value: str) -> None:
    message = refusal(UsageError, LOSSES, **{option: value})
    assert message == f"--{option} {value} needs --best. Add --best N."


def test_a_selection_is_validated_when_it_is_made() -> None:
    """Before any file is opened."""
    Selection(best=1, mode="max", last=3, every=2, from_step=3, to_step=3, at_lr_minima=True)
    with pytest.raises(UsageError):
        Selection(best=1)


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


def test_the_minima_by_the_log() -> None:
    """The log knows the cycles where checkpoints are too rare to show them."""
    assert chosen(Selection(at_lr_minima=True), logged(4, 9, 14, 19, 24, 29, 30)) == [9, 19, 29]
    assert chosen(Selection(at_lr_minima=True), logged(9, 14, 19, 33)) == [9, 19]


def test_the_checkpoint_nearest_to_a_minimum_is_used_if_it_is_near() -> None:
    """A quarter of a cycle is near: saved right after the rate has jumped still is the end of that cycle."""
    assert chosen(Selection(at_lr_minima=True), logged(5, 10, 15, 20, 25, 30)) == [10, 20, 30]
    assert chosen(Selection(at_lr_minima=True), logged(4, 9, 14, 24, 29, 30)) == [9, 29]
    assert "at least twice" in refusal(IncompatibleError, logged(4, 14, 24, 30), at_lr_minima=True)


def test_the_minima_by_the_rates_in_the_checkpoints() -> None:
    """For trainers without a log; here the order of the checkpoints is all that is needed."""
    rates = [0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1]
    bare = [candidate(f"x_{index}.pt", learning_rate=rate) for index, rate in enumerate(rates)]
    assert chosen(Selection(at_lr_minima=True), bare) == [2, 5]


def test_a_log_without_steps_of_the_checkpoints_is_no_help() -> None:
    rates = [0.1, 0.01, 0.1, 0.01, 0.1]
    bare = [candidate(f"x_{index}.pt", learning_rate=rate, rates=LOG) for index, rate in enumerate(rates)]
    assert chosen(Selection(at_lr_minima=True), bare) == [1, 3]


def test_minima_are_between_the_bounds() -> None:
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


def test_of_two_as_near_to_a_minimum_the_later_is_used() -> None:
    """The later one has been trained longer in that cycle."""
    assert chosen(Selection(at_lr_minima=True), logged(8, 10, 18, 20, 28, 30)) == [10, 20, 30]


FOLLOWED = "each of these is followed by a checkpoint with the highest rate"


@pytest.mark.parametrize(
    ("rates", "doubted"),
    [
        ([0.01, 0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1], True),  # each bottom is the last before a restart
        ([0.05, 0.01, 0.1, 0.05, 0.01, 0.096, 0.05], True),  # within 5 %
        ([0.05, 0.01, 0.1, 0.05, 0.01, 0.09, 0.05], False),
        ([0.1, 0.05, 0.01, 0.05, 0.1, 0.05, 0.01, 0.05, 0.1], False),  # triangles
    ],
)
def test_minima_before_the_highest_rate_are_doubted(rates: list[float], doubted: bool) -> None:
    """A scheduler that stepped before the checkpoint was saved shows the next rate: then the tops are the ends."""
    bare = [candidate(f"x_{index}.pt", learning_rate=rate) for index, rate in enumerate(rates)]
    assert any(FOLLOWED in text for text in notices(bare, at_lr_minima=True)) is doubted


def test_minima_by_the_log_are_not_doubted() -> None:
    """A log says at which step each rate was."""
    assert not any(FOLLOWED in text for text in notices(logged(9, 10, 19, 20, 29, 30), at_lr_minima=True))


# --- the minima of a series of rates ------------------------------------------------------------------------

RATES = st.lists(st.sampled_from([0.01, 0.02, 0.05, 0.1]), max_size=30)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], []),
        ([0.1], []),
        ([0.1, 0.1, 0.1], []),
        ([0.3, 0.2, 0.1], []),
        ([0.1, 0.2, 0.3], []),
        ([0.1, 0.2, 0.1], []),
        ([0.2, 0.1, 0.2], [1]),
        ([0.1, 0.05, 0.01, 0.1, 0.05, 0.01, 0.1, 0.05], [2, 5]),
        # The first and the last count, too, if they are as low as the next minimum.
        ([0.01, 0.1, 0.01, 0.1, 0.01], [0, 2, 4]),
        ([0.01, 0.1, 0.01], []),
        ([0.1, 0.01, 0.1, 0.01], [1, 3]),
        ([0.01, 0.1, 0.01, 0.1], [0, 2]),
        # However much lower the last is: a run may end at a new bottom, as SGDR with falling minima does.
        ([0.1, 0.05, 0.1, 0.01], [1, 3]),
        ([0.1, 0.05, 0.1, 0.06], [1]),
        # A warmup begins lower than any cycle; a run may end on the way down.
        ([0.0, 0.1, 0.01, 0.1, 0.01, 0.1, 0.05], [2, 4]),
        # A plateau counts once, by its last.
        ([0.1, 0.01, 0.01, 0.01, 0.1, 0.01, 0.1], [3, 5]),
        ([0.1, 0.01, 0.01, 0.1, 0.1, 0.01, 0.01], [2, 6]),
    ],
)
def test_minima_of(rates: list[float], expected: list[int]) -> None:
    assert minima_of(rates) == expected


@given(RATES)
def test_each_bottom_is_below_what_surrounds_it(rates: list[float]) -> None:
    """Whatever the rates: indices in order, each a local minimum, none twice."""
    found = minima_of(rates)
    assert found == sorted(set(found))
    for index in found:
        before = next((rate for rate in reversed(rates[:index]) if rate != rates[index]), math.inf)
        assert before > rates[index]
        assert index + 1 == len(rates) or rates[index + 1] > rates[index]


@given(RATES)
def test_every_inner_minimum_is_found(rates: list[float]) -> None:
    found = minima_of(rates)
    for index in range(1, len(rates) - 1):
        if rates[index - 1] > rates[index] < rates[index + 1]:
            assert index in found


@given(RATES, st.sampled_from([2.0, 0.5, 1024.0]))
def test_the_scale_of_the_rate_does_not_matter(rates: list[float], factor: float) -> None:
    assert minima_of([rate * factor for rate in rates]) == minima_of(rates)


@given(st.lists(st.sampled_from([0.01, 0.05, 0.1]), min_size=1, max_size=10), st.integers(1, 4))
def test_how_often_a_rate_is_logged_does_not_matter(rates: list[float], times: int) -> None:
    """Logged per batch or per epoch: the bottoms are the same, each by its last entry."""
    often = [rate for rate in rates for _ in range(times)]
    assert minima_of(often) == [index * times + times - 1 for index in minima_of(rates)]


def schedule(make: str, steps: int) -> list[float]:
    """The rates at which each step is made, by torch's own schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler = {
        "cosine restarts": lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, eta_min=0.001),
        "triangles": lambda: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=5),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "steps": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 10),
    }[make]()
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ("cosine restarts", [9, 19, 29, 39]),
        ("triangles", [0, 10, 20, 30, 40]),
        ("one cycle", []),
        ("cosine", []),
        ("steps", []),
    ],
)
def test_the_schedules_of_torch(make: str, expected: list[int]) -> None:
    """Restarts end a cycle at the lowest rate; triangles turn there; what only falls has no cycles."""
    found = minima_of(schedule(make, 41))
    assert found == expected
