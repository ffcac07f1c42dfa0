"""`Ranks`: every rank comes to the same answers, or stops with the same cause; none waits for ever."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from system.faults.rank_runs import QueueLink, Wires, in_threads

from ckpt_avg import UsageError, UserCodeError
from ckpt_avg.distributed.ranks import Failure, Ranks, first_difference
from ckpt_avg.errors import RankError

STOP = "The output path is as it was, or complete if it had been published."


class Terminated(BaseException):
    """A signal, as `ckpt_avg.cli.exits` raises it."""


def test_an_answer_is_made_once_of_the_values_of_all_ranks_in_order() -> None:
    """If it failed, ranks would compute with different shares, names or statistics."""
    calls: list[list[int]] = []

    def work(ranks: Ranks) -> list[int]:
        def answer(values: list[int]) -> list[int]:
            calls.append(values)
            return [value * 2 for value in values]

        time.sleep(0.02 * (3 - ranks.rank))  # they come in another order
        result: list[int] = ranks.exchange("double", ranks.rank + 10, answer)
        return result

    assert in_threads(4, work) == [[20, 22, 24, 26]] * 4
    assert calls == [[10, 11, 12, 13]]


def test_steps_follow_each_other_and_each_has_its_own_answer() -> None:
    """If it failed, a quick rank would take an old answer for the new one."""

    def work(ranks: Ranks) -> list[int]:
        return [ranks.exchange("sum", step * ranks.rank, sum) for step in range(10)]

    assert in_threads(3, work) == [[3 * step for step in range(10)]] * 3


def test_a_single_rank_answers_itself_and_waits_for_nobody() -> None:
    """If it failed, a process that was started alone would hang or need a process group."""
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.exchange("step", 3, sum) == 3
    assert ranks.exchange("step", 3) is None
    ranks.check()
    ranks.leave(None)
    ranks.leave(ValueError("no matter"))


def test_only_rank_0_is_the_first() -> None:
    """If it failed, two ranks would publish, or none."""
    assert in_threads(3, lambda ranks: ranks.is_first) == [True, False, False]


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
        for _ in range(200):
            ranks.check()
            time.sleep(0.02)

    begin = time.monotonic()
    ends = in_threads(3, work)
    assert time.monotonic() - begin < 3
    for rank, end in enumerate(ends):
        assert type(end) is (UsageError if rank == failing else RankError)
        if rank != failing:
            assert str(end) == f"rank {failing} failed: --last: expected 1 or more, got 0. {STOP}"


def test_the_first_cause_wins() -> None:
    """If it failed, the message that the others carry would be of a rank that failed as a consequence."""

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


def test_a_failure_of_rank_0_while_it_answers_reaches_all() -> None:
    """If it failed, the others would wait for an answer that never comes."""

    def refuse(values: list[Any]) -> None:
        raise UserCodeError(f"cannot pool {values}")

    ends = in_threads(3, lambda ranks: ranks.exchange("pool", ranks.rank, refuse))
    assert type(ends[0]) is UserCodeError
    assert [type(end) for end in ends[1:]] == [RankError, RankError]
    assert all(str(end).startswith("rank 0 failed: cannot pool [0, 1, 2]. ") for end in ends[1:])


def test_ranks_at_different_steps_are_told_apart() -> None:
    """If it failed, ranks that were started differently would take each other's values for their own kind."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("files" if ranks.rank == 1 else "request", None)

    ends = in_threads(3, work)
    assert all(isinstance(end, RankError) for end in ends)
    assert str(ends[0]).startswith("expected all ranks at the same step, got 'files' (1), 'request' (1).")
    assert all(str(end).startswith("rank 0 failed: expected all ranks at the same step") for end in ends[1:])


def test_an_answer_that_was_given_is_not_lost_by_a_failure_that_follows_it() -> None:
    """If it failed, a refusal that all ranks come to by themselves would look like another rank's on some of them."""

    def work(ranks: Ranks) -> None:
        answer = ranks.exchange("compare", None, lambda _: "they differ")
        raise UserCodeError(answer)

    for _ in range(5):
        assert [type(end) for end in in_threads(4, work)] == [UserCodeError] * 4


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_stops_all_others(lost: int) -> None:
    """If it failed, one killed process would leave the others waiting."""
    wires = Wires()

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == lost:
            wires.cut(lost)
            raise Terminated
        ranks.exchange("end", None)

    ends = in_threads(3, work, wires=wires)
    for rank, end in enumerate(ends):
        if rank != lost:
            assert str(end) == f"rank {lost} was lost: its connection was closed. {STOP}"


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_says_nothing_is_lost(silent: int) -> None:
    """If it failed, one frozen process would freeze all."""
    wires = Wires(silence=0.4)

    class Frozen(QueueLink):
        def send(self, rank: int, message: dict[str, Any]) -> None:
            time.sleep(1.2 if self._rank == silent else 0)
            super().send(rank, message)

    wires.link = lambda rank: Frozen(wires, rank)  # type: ignore[method-assign]
    ends = in_threads(2, lambda ranks: None if ranks.rank == silent else ranks.exchange("end", None), wires=wires)
    assert str(ends[1 - silent]) == f"rank {silent} was lost: it has been silent. {STOP}"


def test_a_signal_that_another_ranks_failure_caused_gives_that_failure() -> None:
    """If it failed, launchers, which end the other ranks by SIGTERM, would hide why."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == 1:
            raise UsageError("the cause")
        raise Terminated

    ends = in_threads(3, work, pulse=0.1)
    assert isinstance(ends[1], UsageError)
    for rank in (0, 2):
        assert isinstance(ends[rank], RankError)
        assert str(ends[rank]).startswith("rank 1 failed: the cause.")


def test_a_signal_that_all_ranks_get_stays_a_signal() -> None:
    """If it failed, ending the whole group would look like a fault of one of them."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        raise Terminated

    assert [type(end) for end in in_threads(3, work, pulse=0.1)] == [Terminated] * 3


def test_ctrl_c_stays_ctrl_c_whatever_the_others_do() -> None:
    """If it failed, an interactive user would get another exit code than 130."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        raise UsageError("the cause") if ranks.rank == 1 else KeyboardInterrupt

    assert [type(end) for end in in_threads(3, work, pulse=0.1)] == [KeyboardInterrupt, UsageError, KeyboardInterrupt]


def test_the_others_hear_that_a_rank_was_interrupted() -> None:
    """If it failed, the others would say that it was lost, or nothing."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank == 1:
            raise Terminated
        ranks.exchange("end", None)

    ends = in_threads(3, work, pulse=0.1)
    assert isinstance(ends[1], Terminated)
    assert str(ends[0]) == str(ends[2]) == f"rank 1 was interrupted. {STOP}"


def test_ranks_leave_together_however_long_one_takes() -> None:
    """If it failed, a slow rank would find the others gone, and take its own success for a failure."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("done", None)
        if ranks.rank == 1:
            time.sleep(1)
            ranks.check()

    assert in_threads(3, work) == [None] * 3


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_that_leaves_early_does_not_leave_the_others_waiting(leaving: int) -> None:
    """If it failed, a script that catches an error of `average` on one rank would hang on all others."""

    def work(ranks: Ranks) -> None:
        ranks.exchange("begin", None)
        if ranks.rank != leaving:
            ranks.exchange("done", None)

    ends = in_threads(3, work, timeout=1)
    assert ends[leaving] is None
    assert all(isinstance(end, RankError) for rank, end in enumerate(ends) if rank != leaving)


def test_the_first_difference_is_the_first_rank_that_is_not_like_rank_0() -> None:
    """If it failed, a message would blame a rank that is right."""
    assert first_difference([1, 1, 2, 3]) == 2
    assert first_difference([1]) is None
    assert first_difference([None, None]) is None


def test_a_failure_reads_as_a_sentence() -> None:
    """If it failed, messages would not say which rank."""
    assert str(Failure(3, "was lost: its connection was closed")) == "rank 3 was lost: its connection was closed"


def test_no_thread_is_left_behind() -> None:
    """If it failed, a program that averages again and again would gather threads."""
    before = threading.active_count()
    in_threads(3, lambda ranks: ranks.exchange("end", ranks.rank, sum))
    assert threading.active_count() <= before


# -- Any order of things --------------------------------------------------------------------------------------------

ends_of = st.sampled_from(["goes on", "raises", "is lost", "is terminated", "is late"])


def _any(plan: list[list[str]], steps: int) -> None:
    """Lets each rank do what its plan says before each step; all must end, with all answers or one cause."""
    size = len(plan)
    wires = Wires(silence=5)

    def work(ranks: Ranks) -> list[int]:
        answers = []
        for step in range(steps):
            what = plan[ranks.rank][step]
            if what == "is late":
                time.sleep(0.03)
            if what == "raises":
                raise UserCodeError(f"of rank {ranks.rank} at step {step}")
            if what == "is lost":
                wires.cut(ranks.rank)
                raise Terminated
            if what == "is terminated":
                raise Terminated
            ranks.check()
            answers.append(ranks.exchange(f"step {step}", step + ranks.rank, sum))
        return answers

    ends = in_threads(size, work, wires=wires, timeout=20)
    right = [step * size + sum(range(size)) for step in range(steps)]
    if all(what in ("goes on", "is late") for each in plan for what in each):
        assert ends == [right] * size
        return
    first = min(step for each in plan for step, what in enumerate(each) if what not in ("goes on", "is late"))
    culprits = {rank for rank, each in enumerate(plan) if each[first] not in ("goes on", "is late")}
    causes = set()
    for rank, end in enumerate(ends):
        assert isinstance(end, (UserCodeError, RankError, Terminated)), (rank, end)
        if rank not in culprits:
            assert isinstance(end, RankError), (rank, end)
            causes.add(str(end))
            assert any(str(end).startswith(f"rank {culprit} ") for culprit in culprits), (rank, end)
    if all(plan[rank][first] == "raises" for rank in culprits) or len(culprits) == 1:
        assert len(causes) <= 1, causes


plans = st.integers(1, 3).flatmap(
    lambda steps: st.tuples(
        st.lists(st.lists(ends_of, min_size=steps, max_size=steps), min_size=2, max_size=4), st.just(steps)
    )
)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans)
def test_whatever_happens_on_whichever_rank_all_of_them_end(plan: tuple[list[list[str]], int]) -> None:
    """If it failed, some order of steps, failures and losses would hang, or be explained by the wrong rank."""
    _any(*plan)


@pytest.mark.campaign
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans)
def test_whatever_happens_on_whichever_rank_all_of_them_end_at_length(plan: tuple[list[list[str]], int]) -> None:
    """The same, over many orders."""
    _any(*plan)
