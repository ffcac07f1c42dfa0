"""`Ranks`: every rank returns the same results, or stops with the same cause; none waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from system.faults.rank_runs import in_threads, lose
from torch import distributed

from ckpt_avg import UsageError, UserCodeError
from ckpt_avg.distributed import ranks as ranks_module
from ckpt_avg.distributed.ranks import Failure, Ranks, first_difference
from ckpt_avg.errors import RankError

STOP = "The output path is unchanged, or complete if it was already published."


class Terminated(BaseException):
    """A signal, as `ckpt_avg.cli.exits` raises it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, and waits a short time for the cause of a signal."""
    monkeypatch.setattr(ranks_module, "_PULSE", 0.02)
    monkeypatch.setattr(ranks_module, "_AFTER_SIGNAL", 1.0)


def test_rank_0_combines_the_values_once_in_the_order_of_the_ranks() -> None:
    """If it failed, ranks would compute with different shares, names or statistics."""
    calls: list[list[int]] = []

    def work(ranks: Ranks) -> list[int]:
        def combine(values: list[int]) -> list[int]:
            calls.append(values)
            return [value * 2 for value in values]

        time.sleep(0.02 * (3 - ranks.rank))  # they come in another order
        result: list[int] = ranks.exchange("double", ranks.rank + 10, combine)
        return result

    assert in_threads(4, work) == [[20, 22, 24, 26]] * 4
    assert calls == [[10, 11, 12, 13]]


def test_each_exchange_has_its_own_result() -> None:
    """If it failed, a quick rank would return the result of an earlier step."""

    def work(ranks: Ranks) -> list[int]:
        return [ranks.exchange("sum", step * ranks.rank, sum) for step in range(10)]

    assert in_threads(3, work) == [[3 * step for step in range(10)]] * 3


@pytest.mark.parametrize("value", [None, "", "é\n" * 1000, [[1, "a"], {"b": None}], list(range(100_000))], ids=range(5))
def test_values_of_different_sizes_arrive_as_they_are(value: Any) -> None:
    """If it failed, long statistics would be cut, or short ones get a tail."""
    ends = in_threads(3, lambda ranks: ranks.exchange("step", [value, 1][ranks.rank % 2], lambda values: values))
    assert ends == [[value, 1, value]] * 3


def test_values_are_sent_as_json() -> None:
    """If it failed, a rank would unpickle what arrives on its connection."""
    assert (
        in_threads(2, lambda ranks: ranks.exchange("step", (1, 2), lambda values: {1: values}))
        == [{"1": [[1, 2], [1, 2]]}] * 2
    )
    ends = in_threads(2, lambda ranks: ranks.exchange("step", object()))
    assert TypeError in map(type, ends)
    assert not any(end is None for end in ends)


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


def test_only_rank_0_is_the_first() -> None:
    """If it failed, two ranks would publish, or none."""
    assert in_threads(3, lambda ranks: ranks.is_first) == [True, False, False]


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

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == failing:
            raise UsageError("--last: expected 1 or more, got 0.")
        if waits:
            ranks.exchange("end", None)
        for _ in range(400):
            ranks.check()
            time.sleep(0.02)

    begin = time.monotonic()
    ends = in_threads(3, work)
    assert time.monotonic() - begin < 5
    for rank, end in enumerate(ends):
        assert type(end) is (UsageError if rank == failing else RankError)
        if rank != failing:
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

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank < 3:
            raise UsageError(f"of rank {ranks.rank}")
        ranks.exchange("end", None)

    for _ in range(5):
        ends = in_threads(5, work)
        assert [str(end) for end in ends[:3]] == ["of rank 0", "of rank 1", "of rank 2"]
        assert isinstance(ends[3], RankError)
        assert str(ends[3]) == str(ends[4])


def fail_to_combine(values: list[Any]) -> None:
    raise UserCodeError(f"cannot pool {values}")


@pytest.mark.parametrize("is_caught", [False, True])
def test_a_failure_of_rank_0_while_it_combines_reaches_all(is_caught: bool) -> None:
    """If it failed, the others would wait for a result that never comes."""

    def work(ranks: Ranks) -> str:
        try:
            ranks.exchange("pool", ranks.rank, fail_to_combine)
        except UserCodeError:
            if not is_caught:
                raise
        return "went on"

    ends = in_threads(3, work)
    assert ends[0] == "went on" if is_caught else type(ends[0]) is UserCodeError
    assert [type(end) for end in ends[1:]] == [RankError, RankError]
    assert all(str(end).startswith("rank 0 failed: cannot pool [0, 1, 2]. ") for end in ends[1:])


def test_ranks_at_different_steps_are_told_apart() -> None:
    """If it failed, ranks that were started differently would combine values that don't belong together."""
    ends = in_threads(3, lambda ranks: ranks.exchange("files" if ranks.rank == 1 else "request", None))
    for end in ends:
        assert isinstance(end, RankError)
        assert "the ranks are at different steps: files and request." in str(end)


def test_a_result_is_not_lost_by_a_failure_that_follows_it() -> None:
    """If it failed, an error that all ranks find by themselves would look like another rank's on some of them."""

    def work(ranks: Ranks) -> None:
        difference = ranks.exchange("compare", None, lambda _: "they differ")
        raise UserCodeError(difference)

    for _ in range(5):
        assert [type(end) for end in in_threads(4, work)] == [UserCodeError] * 4


def test_an_exit_of_the_users_code_is_a_failure_and_no_signal() -> None:
    """If it failed, sys.exit on one rank would be called an interruption, or hold the others up."""

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise SystemExit(3)
        ranks.exchange("end", None)

    begin = time.monotonic()
    ends = in_threads(2, work)
    assert time.monotonic() - begin < 1
    assert isinstance(ends[1], SystemExit)
    assert str(ends[0]) == f"rank 1 failed: SystemExit: 3. {STOP}"


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_that_leaves_early_does_not_leave_the_others_waiting(leaving: int) -> None:
    """If it failed, a script that catches an error of `average` on one rank would hang on all others."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank != leaving:
            ranks.exchange("done", None)

    ends = in_threads(3, work, timeout=5)
    assert ends[leaving] is None
    for rank, end in enumerate(ends):
        if rank != leaving:
            assert isinstance(end, RankError)
            assert "different steps: done and leave" in str(end) or f"rank {leaving} " in str(end)


def test_ranks_leave_together_however_long_one_takes() -> None:
    """If it failed, a slow rank would find the others gone, and report a failure after success."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("done", None)
        if ranks.rank == 1:
            time.sleep(1)
            ranks.check()

    assert in_threads(3, work) == [None] * 3


# -- A rank that is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("waits", [False, True], ids=["the others work", "the others wait"])
def test_a_lost_rank_stops_all_others(lost: int, waits: bool) -> None:
    """If it failed, one killed process would leave the others waiting."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == lost:
            lose(ranks)
            raise Terminated
        if waits:
            ranks.exchange("end", None)
        for _ in range(400):
            ranks.check()
            time.sleep(0.02)

    ends = in_threads(3, work)
    for rank, end in enumerate(ends):
        if rank != lost:
            assert str(end) == f"rank {lost} was lost: its connection was closed. {STOP}"


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
    for rank, end in enumerate(ends):
        assert isinstance(end, RankError)  # also on the silent one, once it goes on
        if rank != silent:
            assert str(end) == f"rank {silent} was lost: it gave no sign of life for 0.5 s. {STOP}"


def test_work_that_gives_signs_of_life_may_take_longer_than_the_timeout() -> None:
    """If it failed, a long mean or evaluation on one rank would be stopped by those that wait for it."""

    def combine(values: list[int]) -> int:
        for _ in range(30):
            time.sleep(0.05)
            checks[0]()
        return sum(values)

    checks: list[Callable[[], None]] = []

    def work(ranks: Ranks) -> int:
        if ranks.is_first:
            checks.append(ranks.check)
        if ranks.rank == 1:
            for _ in range(30):
                time.sleep(0.05)
                ranks.check()
        result: int = ranks.exchange("end", ranks.rank, combine)
        return result

    assert in_threads(3, work, silence=0.5) == [3, 3, 3]


# -- Signals --------------------------------------------------------------------------------------------------------


def stopping(ranks: Ranks, ends: dict[int, BaseException]) -> None:
    """Raises what a rank is to end with; the others wait for it."""
    ranks.exchange("begin", None)
    if ranks.rank in ends:
        raise ends[ranks.rank]
    ranks.exchange("end", None)


def test_a_signal_that_another_ranks_failure_caused_gives_that_failure() -> None:
    """If it failed, launchers, which stop the other ranks by SIGTERM, would hide why."""
    ends = in_threads(3, lambda ranks: stopping(ranks, {0: Terminated(), 1: UsageError("the cause"), 2: Terminated()}))
    assert isinstance(ends[1], UsageError)
    for rank in (0, 2):
        assert isinstance(ends[rank], RankError)
        assert str(ends[rank]).startswith("rank 1 failed: the cause.")


def test_a_signal_after_another_rank_was_lost_gives_that_cause() -> None:
    """If it failed, logs of the ranks that torchrun stops would say that they were terminated, and not why."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == 1:
            time.sleep(0.3)  # as with worker processes of a data loader, which keep the connections for a while
            lose(ranks)
        raise Terminated

    ends = in_threads(3, work)
    for rank in (0, 2):
        assert str(ends[rank]) == f"rank 1 was lost: its connection was closed. {STOP}"


def test_a_signal_that_all_ranks_get_stays_a_signal() -> None:
    """If it failed, stopping the whole group would look like a fault of one of them, or take long."""
    begin = time.monotonic()
    ends = in_threads(3, lambda ranks: stopping(ranks, {rank: Terminated() for rank in range(3)}))
    assert [type(end) for end in ends] == [Terminated] * 3
    assert time.monotonic() - begin < 1


def test_ctrl_c_stays_ctrl_c_whatever_the_others_do() -> None:
    """If it failed, an interactive user would get another exit code than 130."""
    interrupts: dict[int, BaseException] = {0: KeyboardInterrupt(), 1: UsageError("the cause"), 2: KeyboardInterrupt()}
    ends = in_threads(3, lambda ranks: stopping(ranks, interrupts))
    assert [type(end) for end in ends] == [KeyboardInterrupt, UsageError, KeyboardInterrupt]


@pytest.mark.parametrize("signal", [Terminated, KeyboardInterrupt])
def test_the_others_hear_that_a_rank_was_interrupted(signal: type[BaseException]) -> None:
    """If it failed, the others would say that it was lost, or nothing."""
    ends = in_threads(3, lambda ranks: stopping(ranks, {1: signal()}))
    assert isinstance(ends[1], signal)
    assert str(ends[0]) == str(ends[2]) == f"rank 1 was interrupted. {STOP}"


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
    assert first_difference([1]) is None
    assert first_difference([None, None]) is None


def test_a_failure_reads_as_a_sentence() -> None:
    """If it failed, messages would not say which rank."""
    assert str(Failure(3, "was lost: its connection was closed.")) == "rank 3 was lost: its connection was closed"


# -- Any order of things --------------------------------------------------------------------------------------------

FAULTS = ("raises", "is lost", "is terminated")
plans = st.integers(1, 3).flatmap(
    lambda steps: st.tuples(
        st.lists(
            st.lists(st.sampled_from(["goes on", "is late", *FAULTS]), min_size=steps, max_size=steps),
            min_size=2,
            max_size=4,
        ),
        st.just(steps),
    )
)


def run_plan(plan: list[list[str]], steps: int) -> None:
    """Lets each rank do what its plan says before each step; all must end, with all results or one cause."""
    size = len(plan)

    def work(ranks: Ranks) -> list[int]:
        results = []
        for step in range(steps):
            what = plan[ranks.rank][step]
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

    ends = in_threads(size, work, timeout=20)
    if not any(what in FAULTS for each in plan for what in each):
        assert ends == [[step * size + sum(range(size)) for step in range(steps)]] * size
        return
    first = min(step for each in plan for step, what in enumerate(each) if what in FAULTS)
    culprits = {rank for rank, each in enumerate(plan) if each[first] in FAULTS}
    causes = set()
    for rank, end in enumerate(ends):
        assert isinstance(end, (UserCodeError, RankError, Terminated)), (rank, end)
        if rank not in culprits:
            assert isinstance(end, RankError), (rank, end)
            causes.add(str(end))
            assert any(str(end).startswith(f"rank {culprit} ") for culprit in culprits), (rank, end)
    assert len(causes) <= 1, causes


@pytest.mark.slow
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(plans)
def test_whatever_happens_on_whichever_rank_all_of_them_end(plan: tuple[list[list[str]], int]) -> None:
    """If it failed, some order of steps, failures and losses would hang, or be explained by the wrong rank."""
    run_plan(*plan)


@pytest.mark.campaign
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(plans)
def test_whatever_happens_on_whichever_rank_all_of_them_end_at_length(plan: tuple[list[list[str]], int]) -> None:
    """The same, over many orders."""
    run_plan(*plan)
