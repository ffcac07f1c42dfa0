"""`Ranks`: the processes of one torchrun group, which share a piece of work, agree on each step and stop together.

docs/how-it-works.md (Ranks) says what goes through gloo's collectives, and what through torch's store.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ckpt_avg.errors import CkptAvgError, RankError, UsageError

RANK_TIMEOUT = 1800.0  # seconds without a sign of life; torch has the same for its groups
_PULSE = 0.3  # seconds between two signs of life; a closed connection is seen after three
_PAUSE = 0.002  # seconds between two reads of the store, at first
_AFTER_SIGNAL = 6.0  # seconds; the workers of a data loader hold the connections of a dead rank for up to 5
_LAST_WORDS = 5.0  # seconds for which rank 0, which may hold the store, stays for the others
_PROBE = 1  # the tag of a receive that nobody answers
_CLOSED = "its connection was closed"
_SILENT = "it gave no sign of life for"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the ranks stop.

    Attributes:
        rank: the one that failed first.
        reason: its error message, or how it was lost.
        interrupted: whether a signal stopped it.
        done: how many exchanges it had completed.
    """

    rank: int
    reason: str
    interrupted: bool = False
    done: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} {self.reason}".removesuffix(".")


class Ranks:
    """All ranks, as one of them sees them. `join_ranks` makes it; without a store it is the only rank.

    Once one rank has failed, every other one raises RankError with that cause: to go on, join again.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
        failure: what stops them, once it is known.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, timeout: float = RANK_TIMEOUT) -> None:
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self._store, self._timeout = store, timeout
        self._group: Any = None  # neither has annotations for what is used of it here
        self._store_fails: str | None = None
        self._keys = ["failure", *(f"rank/{each}" for each in range(size))]
        self._step, self._done = (0, ""), 0
        self._pulse = max(_PULSE, size / 100)
        self._next_check = 0.0
        self._signs: list[Any] = []  # what each rank reported last
        self._quiet = set(range(size))  # the ranks that have given no sign of life between the last two looks

    def connect(self) -> None:
        """Waits until all ranks have come, and connects them.

        Raises:
            RankError: one of them did not come.
            RuntimeError: torch could not connect them.
        """
        from torch import distributed

        c10d: Any = distributed
        for key in self._keys:  # reading a key that nobody has set would block
            self._store.compare_set(key, "", "")
        self._wait_for("join", range(self.size))
        seconds = datetime.timedelta(seconds=self._timeout)
        # Not the user's own group, whose collectives are the user's.
        self._group = c10d.ProcessGroupGloo(self._store, self.rank, self.size, seconds)
        self._wait_for("connect", range(self.size))  # one that fails at once must not cut off one that still connects

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which publishes, measures and prints."""
        return self.rank == 0

    def exchange(self, step: str, value: Any, combine: Callable[[list[Any]], Any] = lambda values: None) -> Any:
        """Gathers a value from every rank; rank 0 combines them, and every rank returns the result.

        Args:
            step: a name, the same on every rank.
            value: what JSON can hold.
            combine: called on rank 0 with the values in the order of the ranks; it returns what JSON can hold.

        Raises:
            RankError: another rank failed, was lost, or is at another step.
        """
        if self.size == 1:
            return combine([value])
        if self._group is None:
            raise UsageError("ranks: used after the end of join_ranks. Call this inside of `with join_ranks()`.")
        self._wait_for(step, range(self.size))
        values, result = self._gather(value), None
        if self.is_first:
            with self.share_errors():
                result = combine(values)
        self._wait_for(step, [0])
        result = self._broadcast(result)
        self._done += 1
        return result

    def check(self, *, at_once: bool = False) -> None:
        """Gives a sign of life, and raises RankError if another rank has failed or was lost.

        Call it often during long work, from any thread: unless ``at_once``, most calls only look at the clock.
        """
        if self._group is not None and (at_once or time.monotonic() > self._next_check):
            self._next_check = time.monotonic() + self._pulse
            if at_once:
                self._quiet = set(range(self.size))
            self._stop_for(self._read_store()[1])

    @contextlib.contextmanager
    def share_errors(self) -> Iterator[None]:
        """Tells the other ranks of an exception inside, before it goes on."""
        try:
            yield
        except BaseException as error:
            self._report(error)
            raise

    def leave(self, error: BaseException | None = None) -> None:
        """Waits for the others at the end of the work, or tells them of the error that ends it here."""
        if self._group is None:
            return
        if error is not None:
            self._report(error)
        elif self.failure is None:
            with contextlib.suppress(RankError):  # the work of this rank is done
                self._wait_for("leave", range(self.size))
        deadline = time.monotonic() + _LAST_WORDS
        while self.is_first and len(self._lost(range(self.size))) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(10 * _PAUSE)
        self._group = None  # closes the connections

    def explains(self, error: BaseException) -> bool:
        """Whether ``error`` is the signal by which a launcher stops this rank because another one has failed."""
        known = self.failure
        return _is_signal(error) and known is not None and known.rank != self.rank and not known.interrupted

    def stopped(self) -> RankError:
        """Returns the error that says which rank failed, and why."""
        return RankError(f"{self.failure}. The output path is unchanged, or complete if it was already published.")

    def _wait_for(self, step: str, others: Iterable[int]) -> None:
        """Waits until ``others`` have come to this step."""
        number = self._step[0] + 1
        self._step = (number, step)
        heard: dict[int, tuple[Any, float]] = {}
        pause = _PAUSE
        while True:
            reports, failure = self._read_store()
            if reports and all(reports[rank][0] >= number for rank in others):
                break
            self._stop_for(failure)
            now = time.monotonic()
            for rank in others:
                if rank not in heard or heard[rank][0] != reports[rank]:
                    heard[rank] = reports[rank], now
                elif now - heard[rank][1] > self._timeout:
                    what = f"was lost: {_SILENT}" if reports[rank][0] else "did not join within"
                    self._stop_for(Failure(rank, f"{what} {self._timeout:g} s"))
            time.sleep(pause)
            pause = min(1.5 * pause, self._pulse)
        steps = sorted({reports[rank][1] for rank in others if reports[rank][0] == number})  # the others have continued
        if len(steps) > 1:
            raise RankError(f"the ranks are at different steps: {' and '.join(steps)}. Use one command for all.")

    def _read_store(self) -> tuple[list[Any], Failure | None]:
        """Gives a sign of life; returns what each rank reported last (step number, step, time), and what has failed."""
        lost = self._lost(self._quiet)  # before the store, in which a rank leaves word before it closes its connections
        mine = json.dumps([*self._step, time.monotonic()])
        try:
            self._ask("set", f"rank/{self.rank}", mine)
            failure, *reports = self._ask("multi_get", self._keys)
        except ConnectionError as error:
            return [], Failure(lost[0] if lost else 0, f"was lost: {error}")
        known = Failure(lost[0], f"was lost: {_CLOSED}") if lost else None
        self._quiet = {rank for rank, report in enumerate(reports) if [report] == self._signs[rank : rank + 1]}
        self._signs = reports
        return [json.loads(each or '[0, ""]') for each in reports], Failure(**json.loads(failure)) if failure else known

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the store; raises ConnectionError if the process that holds it, mostly rank 0, is gone.

        A thread asks: the call would neither return nor hear a signal if that process were frozen.
        """
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put([getattr(self._store, method)(*arguments)])
            except RuntimeError:
                answers.put([])

        if self._store_fails is None:
            threading.Thread(target=ask, daemon=True).start()
            try:
                answer = answers.get(timeout=self._timeout)
            except queue.Empty:
                self._store_fails = f"{_SILENT} {self._timeout:g} s"
            else:
                if answer:
                    return answer[0]
                self._store_fails = _CLOSED
        raise ConnectionError(self._store_fails)

    def _lost(self, ranks: Iterable[int]) -> list[int]:
        """Returns those of the ranks whose connections are closed: gloo refuses to receive from them.

        Gloo keeps a note of each attempt, about 90 bytes, so ranks that give signs of life are not asked.
        """
        import torch

        lost = []
        for rank in sorted(ranks):
            if rank != self.rank and self._group is not None:
                try:
                    self._group.recv([torch.empty(1, dtype=torch.uint8)], rank, _PROBE)
                except RuntimeError:
                    lost.append(rank)
        return lost

    def _stop_for(self, failure: Failure | None) -> None:
        """Raises RankError, unless the rank had completed what this one is about to complete without it."""
        if failure is not None and failure.done <= self._done:
            self._post(failure)
            raise self.stopped()

    def _post(self, failure: Failure) -> None:
        """Makes a failure known to all; an earlier failure stays the first cause."""
        self.failure = failure
        mine = json.dumps(asdict(failure))
        with contextlib.suppress(ConnectionError):
            self.failure = Failure(**json.loads(self._ask("compare_set", "failure", "", mine)))

    def _report(self, error: BaseException) -> None:
        if self._group is not None and self.failure is None and _is_signal(error):
            self._wait_for_cause()
        if self._group is not None and self.failure is None:
            text = str(error) if isinstance(error, CkptAvgError) else f"{type(error).__name__}: {error}"
            interrupted = _is_signal(error) or isinstance(error, KeyboardInterrupt)
            reason = "was interrupted" if interrupted else f"failed: {text}"
            self._post(Failure(self.rank, reason, interrupted, self._done))

    def _wait_for_cause(self) -> None:
        """After a launcher's signal, waits until it is known which rank caused it, or that all ranks got one."""
        deadline = time.monotonic() + _AFTER_SIGNAL
        signalled, mine = 0, 1
        while signalled < self.size and time.monotonic() < deadline:
            failure = self._read_store()[1]
            if failure is not None:
                self._post(failure)
                break
            with contextlib.suppress(ConnectionError):  # the next read of the store says why
                signalled = self._ask("add", "signalled", mine)
            mine = 0
            time.sleep(10 * _PAUSE)

    def _gather(self, value: Any) -> list[Any]:
        import torch

        body = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._run(self._group.allgather([sizes], [torch.tensor([len(body)])]))
        longest = int(max(sizes))
        mine = torch.frombuffer(bytearray(body.ljust(longest)), dtype=torch.uint8)
        bodies = [bytearray(longest) for _ in range(self.size)]
        self._run(self._group.allgather([[torch.frombuffer(each, dtype=torch.uint8) for each in bodies]], [mine]))
        return [json.loads(each) for each in bodies]

    def _broadcast(self, value: Any) -> Any:
        """Returns rank 0's value."""
        import torch

        body = bytearray(json.dumps(value).encode())
        size = torch.tensor([len(body)])
        self._run(self._group.broadcast([size]))
        body = body if self.is_first else bytearray(int(size))
        self._run(self._group.broadcast([torch.frombuffer(body, dtype=torch.uint8)]))
        return json.loads(body)

    def _run(self, work: Any) -> None:
        """Waits for a collective that all ranks have come to."""
        while not work.is_completed():
            time.sleep(_PAUSE)
        try:
            work.wait()
        except RuntimeError as error:
            self.check(at_once=True)
            raise RankError(f"the connection to another rank failed: {str(error).splitlines()[0]}") from error


def first_difference(values: Sequence[Any]) -> int | None:
    """Returns the first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)


def _is_signal(error: BaseException) -> bool:
    """Whether it is a signal such as launchers send, unlike Ctrl-C."""
    return not isinstance(error, (Exception, KeyboardInterrupt, SystemExit, GeneratorExit))
