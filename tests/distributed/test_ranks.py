"""`Ranks`: every rank returns the same results, or stops with the same cause; none waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from system.faults.rank_runs import in_threads, lose
from torch import distributed

from ckpt_avg import UsageError, UserCodeError
from ckpt_avg.distributed import ranks as ranks_module
from ckpt_avg.distributed.ranks import Ranks, first_difference
from ckpt_avg.errors import RankError

STOP = "The output path is unchanged, or complete if it was already published."


class Terminated(BaseException):
    """A signal, as `ckpt_avg.cli.exits` raises it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, and waits a short time for the cause of a signal."""
    monkeypatch.setattr(ranks_module, "_PULSE", 0.02)
    monkeypatch.setattr(ranks_module, "_AFTER_SIGNAL", 2.0)


def work_on(ranks: Ranks, *, waits: bool = True) -> None:
    """Waits for the other ranks, or works and looks after them."""
    if waits:
        ranks.exchange("end", None)
    for _ in range(0 if waits else 400):
        ranks.check()
        time.sleep(0.02)


def stopped(size: int, ends: dict[int, Any], *, waits: bool = True) -> list[Any]:
    """Ends some ranks with an exception, or as lost, while the others work on; returns how each ended."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        end = ends.get(ranks.rank)
        if end == "lost":
            lose(ranks)
            raise Terminated
        if end is not None:
            raise end
        work_on(ranks, waits=waits)

    return in_threads(size, work)


def test_rank_0_combines_the_values_once_in_the_order_of_the_ranks() -> None:
    """If it failed, ranks would compute with different shares, names or statistics."""
    calls: list[list[int]] = []

    def work(ranks: Ranks) -> list[list[int]]:
        def combine(values: list[int]) -> list[int]:
            calls.append(values)
            return [value * 2 for value in values]

        assert ranks.is_first == (ranks.rank == 0)
        time.sleep(0.02 * (3 - ranks.rank))  # they come in another order
        return [ranks.exchange("double", ranks.rank + add, combine) for add in (10, 20)]

    assert in_threads(4, work) == [[[20, 22, 24, 26], [40, 42, 44, 46]]] * 4
    assert calls == [[10, 11, 12, 13], [20, 21, 22, 23]]


@pytest.mark.parametrize("value", [None, "", "é\n" * 1000, [[1, "a"], {"b": None}], list(range(100_000))], ids=range(5))
def test_values_of_different_sizes_arrive_as_they_are(value: Any) -> None:
    """If it failed, long statistics would be cut, or short ones get a tail."""
    ends = in_threads(3, lambda ranks: ranks.exchange("step", [value, 1][ranks.rank % 2], lambda values: values))
    assert ends == [[value, 1, value]] * 3


def test_values_are_sent_as_json() -> None:
    """If it failed, a rank would unpickle what arrives on its connection."""
    as_json = {"1": [[1, 2], [1, 2]]}
    assert in_threads(2, lambda ranks: ranks.exchange("step", (1, 2), lambda values: {1: values})) == [as_json] * 2
    ends = in_threads(2, lambda ranks: ranks.exchange("step", object()))
    assert {type(end) for end in ends} <= {TypeError, RankError}


def test_a_single_rank_waits_for_nobody() -> None:
    """If it failed, a process that was started alone would hang or need a process group."""
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.exchange("step", 3, sum) == 3
    assert ranks.exchange("step", 3) is None
    ranks.check()
    with pytest.raises(ValueError, match="mine"), ranks.share_errors():
        raise ValueError("mine")
    ranks.leave()
    ranks.leave(ValueError("no matter"))


def test_ranks_that_have_left_are_refused() -> None:
    """If it failed, a script that keeps them after join_ranks would average alone on every rank."""
    kept = in_threads(2, lambda ranks: ranks)
    with pytest.raises(UsageError, match="used after the end of join_ranks"):
        kept[1].exchange("step", None)
    kept[1].check()


# -- A rank that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("waits", [False, True], ids=["the others work", "the others wait"])
def test_a_rank_that_fails_stops_the_others_with_its_message(failing: int, waits: bool) -> None:
    """If it failed, the others would hang, or the user would have to guess which rank's message is the cause."""
    begin = time.monotonic()
    ends = stopped(3, {failing: UsageError("--last: expected 1 or more, got 0.")}, waits=waits)
    assert time.monotonic() - begin < 5
    assert type(ends.pop(failing)) is UsageError
    for end in ends:
        assert type(end) is RankError
        assert str(end) == f"rank {failing} failed: --last: expected 1 or more, got 0. {STOP}"


def test_the_first_cause_wins() -> None:
    """If it failed, the others would report a failure that is only a consequence."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == 2:
            raise UsageError("the first")
        if ranks.rank == 1:
            with pytest.raises(RankError, match="rank 2 failed: the first"):
                ranks.exchange("more", None)
            raise UserCodeError("the second")
        ranks.exchange("more", None)

    ends = in_threads(4, work)
    assert str(ends[1]) == "the second"
    for rank in (0, 3):
        assert str(ends[rank]).startswith("rank 2 failed: the first.")


def test_ranks_that_fail_at_the_same_time_agree_on_one_cause() -> None:
    """If it failed, ranks that fail together would wait for each other, or logs name several causes."""
    for _ in range(5):
        ends = stopped(5, {rank: UsageError(f"of rank {rank}") for rank in range(3)})
        assert [str(end) for end in ends[:3]] == ["of rank 0", "of rank 1", "of rank 2"]
        assert isinstance(ends[3], RankError)
        assert str(ends[3]) == str(ends[4])


@pytest.mark.parametrize("is_caught", [False, True])
def test_a_failure_of_rank_0_while_it_combines_reaches_all(is_caught: bool) -> None:
    """If it failed, the others would wait for a result that never comes."""

    def combine(values: list[Any]) -> None:
        raise UserCodeError(f"cannot pool {values}")

    def work(ranks: Ranks) -> str:
        try:
            ranks.exchange("pool", ranks.rank, combine)
        except UserCodeError:
            if not is_caught:
                raise
        return "went on"

    ends = in_threads(3, work)
    assert ends[0] == "went on" if is_caught else type(ends[0]) is UserCodeError
    for end in ends[1:]:
        assert type(end) is RankError
        assert str(end).startswith("rank 0 failed: cannot pool [0, 1, 2]. ")


def test_ranks_at_different_steps_are_told_apart() -> None:
    """If it failed, ranks that were started differently would combine values that don't belong together."""
    for end in in_threads(3, lambda ranks: ranks.exchange("files" if ranks.rank == 1 else "request", None)):
        assert isinstance(end, RankError)
        assert "the ranks are at different steps: files and request." in str(end)


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_that_leaves_early_does_not_leave_the_others_waiting(leaving: int) -> None:
    """If it failed, a script that catches an error of `average` on one rank would hang on all others."""
    ends = in_threads(3, lambda ranks: None if ranks.rank == leaving else ranks.exchange("done", None), timeout=5)
    assert ends.pop(leaving) is None
    for end in ends:
        assert isinstance(end, RankError)
        assert "different steps: done and leave" in str(end) or f"rank {leaving} " in str(end)


def test_a_result_is_not_lost_by_a_failure_that_follows_it() -> None:
    """If it failed, an error that all ranks find by themselves would look like another rank's on some of them."""

    def work(ranks: Ranks) -> None:
        raise UserCodeError(ranks.exchange("compare", None, lambda _: "they differ"))

    for _ in range(5):
        assert [type(end) for end in in_threads(4, work)] == [UserCodeError] * 4


@pytest.mark.slow
def test_ranks_leave_together_however_long_one_takes() -> None:
    """If it failed, a slow rank would find the others gone, and report a failure after success."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("done", None)
        if ranks.rank == 1:
            time.sleep(1)
            ranks.check()

    assert in_threads(3, work) == [None] * 3


# -- A rank that is lost, silent, or stopped by a signal ------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("waits", [False, True], ids=["the others work", "the others wait"])
def test_a_lost_rank_stops_all_others(lost: int, waits: bool) -> None:
    """If it failed, one killed process would leave the others waiting."""
    ends = stopped(3, {lost: "lost"}, waits=waits)
    del ends[lost]
    assert [str(end) for end in ends] == [f"rank {lost} was lost: its connection was closed. {STOP}"] * 2


def test_ranks_that_give_signs_of_life_are_seldom_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, gloo would keep a note of each look, for hours, at each rank."""
    original, asked, looks = Ranks._lost, [0], [0]

    def counted(ranks: Ranks, others: Iterable[int]) -> list[int]:
        others = set(others) - {ranks.rank}
        asked[0], looks[0] = asked[0] + len(others), looks[0] + ranks.size - 1
        return original(ranks, others)

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        monkeypatch.setattr(Ranks, "_lost", counted)
        for _ in range(60):
            time.sleep(0.02)
            ranks.check()
        monkeypatch.setattr(Ranks, "_lost", original)

    assert in_threads(3, work) == [None] * 3
    assert looks[0] > 50
    assert asked[0] < looks[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_without_a_sign_of_life_is_lost(silent: int) -> None:
    """If it failed, one frozen process would freeze all."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == silent:
            time.sleep(1.5)
            ranks.check(at_once=True)
        ranks.exchange("end", None)

    ends = in_threads(3, work, silence=0.5)
    assert isinstance(ends.pop(silent), RankError)  # on the silent one, too, once it goes on
    assert [str(end) for end in ends] == [f"rank {silent} was lost: it gave no sign of life for 0.5 s. {STOP}"] * 2


@pytest.mark.slow
def test_work_that_gives_signs_of_life_may_take_longer_than_the_timeout() -> None:
    """If it failed, a long mean or evaluation on one rank would be stopped by those that wait for it."""

    def work(ranks: Ranks) -> int:
        def busy() -> None:
            for _ in range(30):
                time.sleep(0.05)
                ranks.check()

        if ranks.rank == 1:
            busy()
        result: int = ranks.exchange("end", ranks.rank, lambda values: busy() or sum(values))  # type: ignore[func-returns-value]
        return result

    assert in_threads(3, work, silence=0.5) == [3, 3, 3]


@pytest.mark.parametrize(
    ("ends", "types", "cause"),
    [
        # A launcher stops the other ranks after a failure.
        ([Terminated(), UsageError("no"), Terminated()], [RankError, UsageError, RankError], "rank 1 failed: no."),
        ([Terminated(), "lost", Terminated()], [RankError, Terminated, RankError], "rank 1 was lost: its connection"),
        # Somebody stops all of them, or one.
        ([Terminated(), Terminated(), Terminated()], [Terminated, Terminated, Terminated], ""),
        ([None, Terminated(), None], [RankError, Terminated, RankError], f"rank 1 was interrupted. {STOP}"),
        ([None, KeyboardInterrupt(), None], [RankError, KeyboardInterrupt, RankError], "rank 1 was interrupted."),
        # Ctrl-C stays Ctrl-C.
        ([KeyboardInterrupt(), UsageError("no"), None], [KeyboardInterrupt, UsageError, RankError], "rank "),
        # sys.exit is no signal.
        ([None, SystemExit(3), None], [RankError, SystemExit, RankError], f"rank 1 failed: SystemExit: 3. {STOP}"),
    ],
    ids=["failure", "loss", "all", "one", "Ctrl-C", "Ctrl-C and failure", "exit"],
)
def test_a_signal_gives_its_cause_if_another_rank_has_one(ends: list[Any], types: list[type], cause: str) -> None:
    """If it failed, launchers, which stop the other ranks by SIGTERM, would hide why; or all ranks blame each other."""
    begin = time.monotonic()
    found = stopped(3, {rank: end for rank, end in enumerate(ends) if end is not None})
    assert list(map(type, found)) == types
    assert all(str(end).startswith(cause) for end in found if type(end) is RankError)
    if ends.count(None) < 2 or not isinstance(ends[1], Terminated):
        assert time.monotonic() - begin < 2  # only a signal to one rank has to wait for a cause


def test_a_loss_that_shows_after_the_signal_is_its_cause() -> None:
    """If it failed, the workers of a dead rank's data loader, which hold its connections for a while, would hide it."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == 1:
            time.sleep(0.3)
            lose(ranks)
        raise Terminated

    ends = in_threads(3, work)
    assert [str(ends[rank]) for rank in (0, 2)] == [f"rank 1 was lost: its connection was closed. {STOP}"] * 2


# -- Joining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_rank_that_does_not_come_is_named(rank: int, missing: int) -> None:
    """If it failed, a machine that could not start its rank would have to be guessed."""
    with pytest.raises(RankError) as error:
        Ranks(rank, 2, distributed.HashStore(), 0.1).connect()
    assert str(error.value) == f"rank {missing} did not join within 0.1 s. {STOP}"


def test_no_thread_is_left_behind() -> None:
    """If it failed, a program that averages again and again would gather threads."""
    before = threading.active_count()
    in_threads(3, lambda ranks: ranks.exchange("end", ranks.rank, sum))
    assert threading.active_count() <= before


def test_the_first_difference_is_the_first_rank_that_is_not_like_rank_0() -> None:
    """If it failed, a message would blame a rank that is right."""
    assert first_difference([1, 1, 2, 3]) == 2
    assert first_difference([1]) is first_difference([None, None]) is None


# -- Any order of things --------------------------------------------------------------------------------------------

FAULTS = ("raises", "is lost", "is terminated")
what_happens = st.sampled_from(["goes on", "is late", *FAULTS])
plans = st.integers(1, 3).flatmap(
    lambda steps: st.lists(st.lists(what_happens, min_size=steps, max_size=steps), min_size=2, max_size=4)
)
quietly = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def run_plan(plan: list[list[str]]) -> None:
    """Lets each rank do what its plan says before each step; all must end, with all results or one cause."""
    size, steps = len(plan), len(plan[0])

    def work(ranks: Ranks) -> list[int]:
        results = []
        for step, what in enumerate(plan[ranks.rank]):
            if what == "is late":
                time.sleep(0.03)
            if what == "raises":
                raise UserCodeError(f"of rank {ranks.rank} at step {step}")
            if what == "is lost":
                lose(ranks)
            if what in ("is lost", "is terminated"):
                raise Terminated
            ranks.check()
            results.append(ranks.exchange(f"step {step}", step + ranks.rank, sum))
        return results

    ends = in_threads(size, work)
    if not any(what in FAULTS for each in plan for what in each):
        assert ends == [[step * size + sum(range(size)) for step in range(steps)]] * size
        return
    first = min(step for each in plan for step, what in enumerate(each) if what in FAULTS)
    culprits = {rank for rank, each in enumerate(plan) if each[first] in FAULTS}
    assert all(isinstance(end, (UserCodeError, RankError, Terminated)) for end in ends), ends
    causes = {f"{type(end).__name__} {end}" for rank, end in enumerate(ends) if rank not in culprits}
    assert len(causes) <= 1, causes
    assert all(any(cause.startswith(f"RankError rank {culprit} ") for culprit in culprits) for cause in causes), causes


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=quietly)
@given(plans)
def test_whatever_happens_on_whichever_rank_all_of_them_end(plan: list[list[str]]) -> None:
    """If it failed, some order of steps, failures and losses would hang, or be explained by the wrong rank."""
    run_plan(plan)


@pytest.mark.campaign
@settings(max_examples=300, deadline=None, suppress_health_check=quietly)
@given(plans)
def test_whatever_happens_on_whichever_rank_all_of_them_end_at_length(plan: list[list[str]]) -> None:
    """The same, over many orders."""
    run_plan(plan)
