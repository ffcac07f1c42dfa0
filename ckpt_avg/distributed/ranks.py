"""`Ranks`: the processes of one torchrun group, which share a piece of work, agree on each step and stop together.

Values travel as JSON through collectives of gloo. What must be known at any time is in the store of torch's process
group: the step that each rank has come to, a sign of life, and the first failure. Ranks wait in Python, where a signal
ends the wait; a collective begins once all ranks have come to it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ckpt_avg.errors import CkptAvgError, RankError, UsageError

RANK_TIMEOUT = 1800.0  # seconds without a sign of life, as torch's own default
_PULSE = 0.5  # seconds between two signs of life
_PAUSE = 0.002  # seconds between two looks at the store, at first
_AFTER_SIGNAL = 6.0  # seconds; the worker processes of a data loader keep the connections of a dead rank for up to 5
_LAST_WORDS = 5.0  # seconds for which rank 0, which may hold the store, stays for the others
_PROBE = 1  # the tag of a receive that nobody answers


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
    """All ranks, as one of them sees them. `join_ranks` makes it; without a group it is the only rank.

    Once one rank has failed, every other one raises RankError with that cause: to go on, join again.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
        failure: what stops them, once it is known.
        store: of torch, which these ranks alone share; None for a single process.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: Any = None,
        store: Any = None,
        timeout: float = RANK_TIMEOUT,
    ) -> None:
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self.store, self._group = store, group
        self._timeout = timeout
        self._pulse = max(_PULSE, size / 100)
        self._store_is_gone = False
        self._next_check = 0.0
        self._step = (0, "")
        self._done = 0

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
        self._meet(step, range(self.size))
        values = self._gather(value)
        result = None
        if self.is_first:
            with self.share_errors():
                result = combine(values)
        self._meet(step, [0])
        result = self._broadcast(result)
        self._done += 1
        return result

    def check(self, *, at_once: bool = False) -> None:
        """Gives a sign of life, and raises RankError if another rank has failed or was lost.

        Call it often during long work, from any thread: unless ``at_once``, most calls only look at the clock.
        """
        if self._group is None or (time.monotonic() < self._next_check and not at_once):
            return
        self._next_check = time.monotonic() + self._pulse
        self._stop_for(self._look()[1])

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
                self._meet("leave", range(self.size))
        self._ask(lambda store: store.set(f"left/{self.rank}", ""))
        waiting = set(range(1, self.size)) - {self.failure and self.failure.rank} if self.is_first else set()
        deadline = time.monotonic() + _LAST_WORDS
        while waiting and time.monotonic() < deadline:
            waiting -= set(self._lost())
            waiting = {rank for rank in waiting if not self._has_left(rank)}
            time.sleep(_PAUSE)
        self._group = None  # closes the connections

    def explains(self, error: BaseException) -> bool:
        """Whether ``error`` is the signal by which a launcher stops this rank because another one has failed."""
        known = self.failure
        return _is_signal(error) and known is not None and known.rank != self.rank and not known.interrupted

    def stopped(self) -> RankError:
        """Returns the error that says which rank failed, and why."""
        return RankError(f"{self.failure}. The output path is as it was, or complete if it had been published.")

    def _meet(self, step: str, others: Iterable[int]) -> None:
        """Waits until ``others`` have come to this step."""
        self._step = (self._step[0] + 1, step)
        heard: dict[int, tuple[Any, float]] = {}
        pause = _PAUSE
        while True:
            said, failure = self._look()
            if said and all(said[rank][0] >= self._step[0] for rank in others):
                break
            self._stop_for(failure)
            now = time.monotonic()
            for rank in others:
                if rank not in heard or heard[rank][0] != said[rank]:
                    heard[rank] = said[rank], now
                elif now - heard[rank][1] > self._timeout:
                    self._stop_for(Failure(rank, f"was lost: it gave no sign of life for {self._timeout:g} s"))
            time.sleep(pause)
            pause = min(1.5 * pause, self._pulse)
        steps = sorted({said[rank][1] for rank in others if said[rank][0] == self._step[0]})  # the rest has gone on
        if len(steps) > 1:
            raise RankError(
                f"expected all ranks at the same step, got {', '.join(map(repr, steps))}. Start all of them alike."
            )

    def _look(self) -> tuple[list[Any], Failure | None]:
        """Gives a sign of life; returns what each rank has said last (step number, step, time), and what has failed."""
        lost = self._lost()  # before the store, in which a rank leaves word before it closes its connections
        gone = Failure(lost[0] if lost else 0, "was lost: its connection was closed")
        if 0 in lost and not torchrun_holds_store():
            self._store_is_gone = True
        mine = json.dumps([*self._step, time.monotonic()])
        keys = ["failure", *(f"rank/{rank}" for rank in range(self.size))]
        self._ask(lambda store: store.set(f"rank/{self.rank}", mine))
        failure, *said = self._ask(lambda store: store.multi_get(keys), [None])
        known = Failure(**json.loads(failure)) if failure else gone if lost or not said else None
        return [json.loads(each) for each in said], known

    def _ask(self, question: Callable[[Any], Any], otherwise: Any = None) -> Any:
        """Returns the answer of the store, or ``otherwise`` if it is gone with the process that held it."""
        if not self._store_is_gone:
            try:
                return question(self.store)
            except RuntimeError:
                self._store_is_gone = True  # torch prints a stack trace for each attempt to reach it
        return otherwise

    def _lost(self) -> list[int]:
        """Returns the ranks whose connections are closed: gloo refuses to receive from them."""
        import torch

        lost = []
        for rank in range(self.size):
            if rank != self.rank:
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
        """Makes a failure known to all, unless there is one already, which then stands here, too."""
        mine = json.dumps(asdict(failure))
        self.failure = Failure(**json.loads(self._ask(lambda store: store.compare_set("failure", "", mine), mine)))

    def _has_left(self, rank: int) -> bool:
        return bool(self._ask(lambda store: store.check([f"left/{rank}"]), otherwise=True))

    def _report(self, error: BaseException) -> None:
        if self._group is None or self.failure is not None:
            return
        if _is_signal(error):
            self._wait_for_cause()
        if self.failure is None:
            text = str(error) if isinstance(error, CkptAvgError) else f"{type(error).__name__}: {error}"
            interrupted = _is_signal(error) or isinstance(error, KeyboardInterrupt)
            reason = "was interrupted" if interrupted else f"failed: {text}"
            self._post(Failure(self.rank, reason, interrupted, self._done))

    def _wait_for_cause(self) -> None:
        """After a launcher's signal, waits until it is known which rank caused it, or that all ranks got one."""
        deadline = time.monotonic() + _AFTER_SIGNAL
        signalled = self._ask(lambda store: store.add("signalled", 1), 0)
        while signalled < self.size and time.monotonic() < deadline:
            failure = self._look()[1]
            if failure is not None:
                self._post(failure)
                return
            time.sleep(_PAUSE)
            signalled = self._ask(lambda store: store.add("signalled", 0), 0)

    def _gather(self, value: Any) -> list[Any]:
        import torch

        body = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._run(self._group.allgather([sizes], [torch.tensor([len(body)])]))
        longest = int(max(sizes))
        bodies = [bytearray(longest) for _ in range(self.size)]
        tensors = [torch.frombuffer(each, dtype=torch.uint8) for each in bodies]
        self._run(
            self._group.allgather([tensors], [torch.frombuffer(bytearray(body.ljust(longest)), dtype=torch.uint8)])
        )
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


def connect_ranks(store: Any, rank: int, size: int, timeout: float) -> Ranks:
    """Waits until all ranks have come to the same store, and connects them.

    The store may hold what an earlier attempt, or an earlier call, has left there. So each rank brings a number of its
    own, and they begin once all of them have found their own among those that rank 0 has gathered.

    Raises:
        RankError: they did not all come.
        RuntimeError: gloo could not connect them.
    """
    from torch import distributed

    c10d: Any = distributed
    mine = secrets.token_hex(8)
    store.set(f"number/{rank}", mine)
    deadline = time.monotonic() + timeout
    shared: Any = None
    while shared is None or not shared.check([f"rank/{each}" for each in range(size)]):
        if time.monotonic() > deadline:
            missing = [each for each in range(size) if not store.check([f"number/{each}"])]
            raise RankError(
                f"expected {size} ranks to join within {timeout:g} s, got nothing from "
                f"{f'rank {missing[0]}' if missing else 'one of them'}. Start all of them with torchrun; for a single "
                "process unset RANK and WORLD_SIZE."
            )
        time.sleep(_PAUSE)
        if rank == 0 and store.check([f"number/{each}" for each in range(size)]):
            store.set("numbers", json.dumps([store.get(f"number/{each}").decode() for each in range(size)]))
        numbers = store.get("numbers") if store.check(["numbers"]) else b"[]"
        if mine in json.loads(numbers):
            shared = c10d.PrefixStore(hashlib.sha256(numbers).hexdigest(), store)
            shared.compare_set("failure", "", "")
            shared.set(f"rank/{rank}", json.dumps([0, "", 0.0]))
    # Collectives of its own, which the user's code cannot get in the way of.
    group = c10d.ProcessGroupGloo(shared, rank, size, datetime.timedelta(seconds=timeout))
    ranks = Ranks(rank, size, group, shared, timeout)
    ranks._meet("join", range(size))  # a rank that fails at once must not cut off one that is still connecting
    return ranks


def torchrun_holds_store() -> bool:
    """Whether the store is in torchrun's own process; otherwise rank 0 holds it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def first_difference(values: Sequence[Any]) -> int | None:
    """Returns the first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)


def _is_signal(error: BaseException) -> bool:
    """Whether it stands for a signal such as launchers send, unlike Ctrl-C."""
    return not isinstance(error, (Exception, KeyboardInterrupt, SystemExit, GeneratorExit))
