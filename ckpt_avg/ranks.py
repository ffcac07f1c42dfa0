"""`Ranks`: several processes that do one piece of work, agree on each step of it, and stop together.

A thread of each rank talks to one of rank 0 several times a second, whatever the main thread is doing. So a rank that
fails tells the others why at once, one that is killed is noticed when its connection closes, and one that is cut off
or frozen when it has been silent for `SILENCE`. The main thread meets the others in `exchange` alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ckpt_avg.errors import RankError

SILENCE = 120.0  # seconds; a rank may hold the interpreter for long, in an import or in the user's code
_PULSE = 0.1  # seconds between two messages of a rank that has nothing to say
_LAST_WORDS = 5.0  # seconds for which a rank that fails waits until the others know


class Link(Protocol):
    """Carries messages between rank 0 and each other rank. One thread uses it."""

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
        return f"rank {self.rank} {self.reason}"


class Ranks:
    """The ranks as one of them sees them. Without a link it is the only one, and nothing waits or is sent.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, link: Link | None = None) -> None:
        self.rank, self.size = rank, size
        self._link = link
        self._changed = threading.Condition()
        self._step = 0
        # Rank 0: what each rank has brought to a step. Others: what this one still has to send.
        self._brought: dict[int, Any] = {}
        self._answer: tuple[int, Any] | None = None
        self._failure: Failure | None = None
        self._leaving = False
        self._thread: threading.Thread | None = None
        if link is not None:
            talk = self._serve if rank == 0 else self._report
            self._thread = threading.Thread(target=talk, args=(link,), name="ranks", daemon=True)
            self._thread.start()

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
            RankError: another rank failed, or was lost, or is elsewhere.
        """
        if self._link is None:
            return answer([value])
        with self._changed:
            self._step += 1
            self._brought[self.rank] = [self._step, step, value]
            self._changed.notify_all()
            if not self.is_first:
                self._changed.wait_for(lambda: self._failure or (self._answer and self._answer[0] == self._step))
                if self._answer is not None and self._answer[0] == self._step:
                    return self._answer[1]
                raise self._stopped()
            self._changed.wait_for(lambda: self._failure or len(self._brought) == self.size)
            if self._failure:
                raise self._stopped()
            brought, self._brought = self._brought, {}
        places = sorted({f"{name!r} ({number})" for number, name, _ in brought.values()})
        if len(places) > 1:
            raise RankError(f"expected all ranks at the same step, got {', '.join(places)}. Start all of them alike.")
        answered = answer([brought[rank][2] for rank in range(self.size)])
        with self._changed:
            self._answer = (self._step, answered)
            self._changed.notify_all()
        return answered

    def check(self) -> None:
        """Raises RankError if another rank is known to have failed."""
        if self._failure is not None:
            raise self._stopped()

    def leave(self, error: BaseException | None) -> None:
        """Tells the others that this rank is done, or why it stops. After that it hears of them no more.

        Raises:
            RankError: in place of an interruption that came because another rank had failed: launchers end the
                others by a signal.
        """
        if self._thread is None:
            return
        is_signal = error is not None and not isinstance(error, Exception)
        with self._changed:
            if is_signal:
                self._changed.wait_for(lambda: self._failure, timeout=10 * _PULSE)
            cause = self._failure
            if error is not None and cause is None:
                reason = "was interrupted" if is_signal else f"failed: {error}"
                self._failure = Failure(self.rank, reason, interrupted=is_signal)
            self._leaving = True
            self._changed.notify_all()
        self._thread.join(None if error is None else _LAST_WORDS)
        if is_signal and not isinstance(error, KeyboardInterrupt) and cause is not None and not cause.interrupted:
            raise self._stopped() from error

    def _stopped(self) -> RankError:
        reason = str(self._failure).removesuffix(".")
        return RankError(f"{reason}. The output path is as it was, or complete if it had been published.")

    def _fail(self, failure: Failure) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _report(self, link: Link) -> None:
        """The thread of every rank but 0."""
        told: int | None = None
        while True:
            with self._changed:
                if not self._leaving and not self._failure and self._step == told:
                    self._changed.wait(_pulse(self.size))
                leaving, failure = self._leaving, self._failure
                brings = self._brought.get(self.rank) if self._step != told else None
                told = self._step
            try:
                link.send(0, {"failure": asdict(failure) if failure else None, "brings": brings, "leaves": leaving})
                reply = link.receive(0)
            except ConnectionError as error:
                self._fail(Failure(0, f"was lost: {error}"))
                return
            with self._changed:
                if reply["failure"]:
                    self._failure = self._failure or Failure(**reply["failure"])
                if reply["answer"]:
                    self._answer = tuple(reply["answer"])
                self._changed.notify_all()
            if leaving:
                return
            if failure:  # known on both sides: only the leaving is still to be said
                with self._changed:
                    self._changed.wait_for(lambda: self._leaving, timeout=_pulse(self.size))

    def _serve(self, link: Link) -> None:
        """The thread of rank 0. It ends when all others have left, or know of a failure and this rank leaves too."""
        present = set(range(1, self.size))
        answered: dict[int, int] = {}
        while present:
            messages = {}
            for rank in sorted(present):
                try:
                    messages[rank] = link.receive(rank)
                except ConnectionError as error:  # noqa: PERF203 (each rank may be lost by itself)
                    self._fail(Failure(rank, f"was lost: {error}"))
                    present.remove(rank)
            with self._changed:
                for rank, message in messages.items():
                    if message["failure"]:
                        self._failure = self._failure or Failure(**message["failure"])
                    if message["brings"]:
                        self._brought[rank] = message["brings"]
                    if message["leaves"]:
                        present.discard(rank)
                self._changed.notify_all()
                failure, answer, leaving = self._failure, self._answer, self._leaving
            for rank in messages:
                is_new = answer is not None and answered.get(rank) != answer[0]
                try:
                    link.send(
                        rank, {"failure": asdict(failure) if failure else None, "answer": answer if is_new else None}
                    )
                except ConnectionError as error:
                    self._fail(Failure(rank, f"was lost: {error}"))
                    present.discard(rank)
                if answer is not None:
                    answered[rank] = answer[0]
            if leaving and failure:
                return


def _pulse(size: int) -> float:
    """Returns seconds between messages, so that rank 0 hears no more than some hundred of them a second."""
    return max(_PULSE, size / 500)


def first_difference(values: Sequence[Any]) -> int | None:
    """Returns the first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
