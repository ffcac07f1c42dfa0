"""`Ranks`: several processes that do one piece of work, agree on each step of it, and stop together.

A thread of each rank talks to one of rank 0 several times a second, whatever the main thread is doing. So a rank that
fails tells the others why at once, one that is killed is noticed when its connection closes, and one that is cut off
or frozen when it has been silent for `SILENCE`. The main thread meets the others in `exchange` alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ckpt_avg.errors import CkptAvgError, RankError

SILENCE = 120.0  # seconds; a rank may hold the interpreter for long, in an import or in the user's code
_PULSE = 0.1  # seconds between two messages of a rank that has nothing to say
_LAST_WORDS = 5.0  # seconds for which a rank that fails waits until the others know


class Link(Protocol):
    """Carries messages between rank 0 and each other rank. One thread uses it for each pair of ranks."""

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """Sends a message; raises ConnectionError if the other side is gone."""

    def receive(self, rank: int) -> dict[str, Any]:
        """Waits for a message; raises ConnectionError if the other side is gone or has been silent for too long."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the ranks stop.

    Attributes:
        rank: the one that failed first.
        reason: its error message, or how it was lost.
        interrupted: whether it was a signal that stopped it.
    """

    rank: int
    reason: str
    interrupted: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} {self.reason}".removesuffix(".")


class Ranks:
    """The ranks as one of them sees them. Without a link it is the only one, and nothing waits or is sent.

    Once a rank has failed, all of them have: whoever goes on joins again.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
        failure: what stops them, once it is known.
    """

    def __init__(self, rank: int = 0, size: int = 1, link: Link | None = None) -> None:
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self._changed = threading.Condition()
        self._step = 0
        # Rank 0: what each rank has brought to a step. Others: what this one still has to send.
        self._brought: dict[int, Any] = {}
        self._answer: tuple[int, Any] | None = None
        self._leaving = False
        self._left: set[int] = set()
        self._threads: list[threading.Thread] = []
        if link is not None:
            for peer in range(1, size) if rank == 0 else [0]:
                talk = self._serve if rank == 0 else self._report
                self._threads.append(threading.Thread(target=talk, args=(link, peer), name=f"rank {peer}", daemon=True))
            for thread in self._threads:
                thread.start()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which publishes, measures and prints."""
        return self.rank == 0

    def exchange(self, step: str, value: Any, answer: Callable[[list[Any]], Any] = lambda values: None) -> Any:
        """Waits until every rank has come to a step; rank 0 makes one answer for all of what they bring.

        Args:
            step: the same on every rank.
            value: what this rank brings; what JSON can hold.
            answer: called on rank 0 with the values of all ranks in order; it returns what JSON can hold.

        Returns:
            The answer, on every rank.

        Raises:
            RankError: another rank failed, or was lost, or has left, or is elsewhere.
        """
        if not self._threads:
            return answer([value])
        with self._changed:
            self._step += 1
            self._brought[self.rank] = [self._step, step, value]
            self._changed.notify_all()
            if not self.is_first:
                self._changed.wait_for(lambda: self.failure or self._has_answer() or self._left)
                if self._answer is not None and self._has_answer():
                    return self._answer[1]
                self.failure = self.failure or Failure(0, "has left")
                raise self.stopped()
            self._changed.wait_for(lambda: self.failure or len(self._brought) == self.size or self._missing())
            if len(self._brought) < self.size:
                self.failure = self.failure or Failure(min(self._missing()), "has left")
            if self.failure:
                raise self.stopped()
            brought, self._brought = self._brought, {}
        places = sorted({f"{name!r} ({number})" for number, name, _ in brought.values()})
        if len(places) > 1:
            raise RankError(f"expected all ranks at the same step, got {', '.join(places)}. Start all of them alike.")
        answered = answer([brought[rank][2] for rank in range(self.size)])
        with self._changed:
            self._answer = (self._step, answered)
            self._changed.notify_all()
        return answered

    def check(self, *, wait: bool = False) -> None:
        """Raises RankError if another rank is known to have failed; with ``wait`` also if that becomes known soon."""
        if wait:
            self._wait_for_news()
        if self.failure is not None and self.failure.rank != self.rank:
            raise self.stopped()

    def stopped(self) -> RankError:
        """Returns the error of what is known to have failed."""
        return RankError(f"{self.failure}. The output path is as it was, or complete if it had been published.")

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the other ranks of any exception inside, also where the caller goes on behind it."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    def leave(self, error: BaseException | None) -> None:
        """Tells the others that this rank is done, or why it stops. After that it hears of them no more.

        Raises:
            RankError: in place of an interruption that came because another rank had failed: launchers end the
                others by a signal.
        """
        if error is not None:
            self._tell(error)
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        deadline = time.monotonic() + _LAST_WORDS
        for thread in self._threads:
            thread.join(None if error is None else max(0.0, deadline - time.monotonic()))
        if error is not None and self.explains(error):
            raise self.stopped() from error

    def explains(self, error: BaseException) -> bool:
        """Whether an interruption of this rank came because another one had failed."""
        is_signal = not isinstance(error, (Exception, KeyboardInterrupt))
        known = self.failure
        return is_signal and known is not None and known.rank != self.rank and not known.interrupted

    def _tell(self, error: BaseException) -> None:
        is_signal = not isinstance(error, Exception)
        with self._changed:
            if is_signal:
                self._wait_for_news()
            if self.failure is None:
                text = str(error) if isinstance(error, CkptAvgError) else f"{type(error).__name__}: {error}"
                reason = "was interrupted" if is_signal else f"failed: {text}"
                self.failure = Failure(self.rank, reason, interrupted=is_signal)
            self._changed.notify_all()

    def _wait_for_news(self) -> None:
        """Waits a moment for what other ranks may have to tell."""
        if self._threads:
            with self._changed:
                self._changed.wait_for(lambda: self.failure, timeout=10 * _PULSE)

    def _has_answer(self) -> bool:
        return self._answer is not None and self._answer[0] == self._step

    def _missing(self) -> set[int]:
        """Returns the ranks that have left, and so will never bring what rank 0 waits for."""
        return self._left - self._brought.keys()

    def _lose(self, rank: int, error: Exception) -> None:
        reason = str(error) if isinstance(error, ConnectionError) else f"{type(error).__name__}: {error}"
        with self._changed:
            self.failure = self.failure or Failure(rank, f"was lost: {reason}")
            self._changed.notify_all()

    def _hear(self, peer: int, message: dict[str, Any]) -> None:
        """Takes what every message says; the caller holds the lock."""
        if message["failure"]:
            self.failure = self.failure or Failure(**message["failure"])
        if message["leaves"]:
            self._left.add(peer)
        self._changed.notify_all()

    def _report(self, link: Link, peer: int) -> None:
        """The thread of every rank but 0: says what there is, and takes the reply, until this rank leaves."""
        told: int | None = None
        heard: Failure | None = None
        while True:
            with self._changed:
                if not self._leaving and self.failure == heard and self._step == told:
                    self._changed.wait(max(_PULSE, self.size / 500))
                leaving, heard = self._leaving, self.failure
                brings = self._brought.get(self.rank) if self._step != told else None
                told = self._step
            try:
                link.send(peer, {"failure": heard and asdict(heard), "brings": brings, "leaves": leaving})
                reply = link.receive(peer)
            except Exception as error:  # a thread that ends unheard would leave the main thread waiting
                self._lose(peer, error)
                return
            with self._changed:
                if reply["answer"]:
                    self._answer = tuple(reply["answer"])
                self._hear(peer, reply)
            if leaving:
                return

    def _serve(self, link: Link, peer: int) -> None:
        """A thread of rank 0: hears one rank, and tells it what there is, until it leaves or knows of a failure."""
        answered: int | None = None
        while True:
            try:
                message = link.receive(peer)
            except Exception as error:  # a thread that ends unheard would leave the main thread waiting
                self._lose(peer, error)
                return
            with self._changed:
                if message["brings"]:
                    self._brought[peer] = message["brings"]
                self._hear(peer, message)
                failure, leaving = self.failure, self._leaving
                answer = self._answer if self._answer and self._answer[0] != answered else None
            try:
                link.send(peer, {"failure": failure and asdict(failure), "answer": answer, "leaves": leaving})
            except Exception as error:  # a thread that ends unheard would leave the main thread waiting
                self._lose(peer, error)
                return
            if answer is not None:
                answered = answer[0]
            if message["leaves"] or (failure and leaving):
                return


def first_difference(values: Sequence[Any]) -> int | None:
    """Returns the first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
