"""How ranks find each other in a store of torch, which may hold what an earlier attempt has left there.

Each rank comes with a number of its own; rank 0 makes a name out of all of them, and begins once every rank has agreed
to that name. So nothing that a process which is gone has written is taken for an answer, and nothing depends on how a
launcher counts its attempts. All waiting is done here, in Python, where a signal ends it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from typing import Protocol

from ckpt_avg.errors import RankError

_PAUSE = 0.02  # seconds


class Store(Protocol):
    """What is needed of torch's `Store`: keys and values that all ranks see."""

    def set(self, key: str, value: str, /) -> None:
        """Sets a value."""

    def get(self, key: str, /) -> bytes:
        """Returns a value; waits until there is one."""

    def check(self, keys: list[str], /) -> bool:
        """Whether there are values of all keys."""


def meet(store: Store, rank: int, size: int, seconds: float) -> str:
    """Waits for all ranks.

    Args:
        store: the same for all.
        rank, size: this one's number among how many.
        seconds: for how long.

    Returns:
        A name that these processes, and no others, have in common.

    Raises:
        RankError: they did not all come.
    """
    mine = secrets.token_hex(8)
    store.set(f"come/{rank}", mine)
    deadline = time.monotonic() + seconds
    meeting = _Host(store, size) if rank == 0 else _Guest(store, rank, mine)
    while (name := meeting.name()) is None:
        if time.monotonic() > deadline:
            raise RankError(
                f"expected {size} ranks to find each other within {seconds:.0f} s, got nothing of {meeting.missing()}. "
                "Start all of them with torchrun; for a single process unset RANK and WORLD_SIZE."
            )
        time.sleep(_PAUSE)
    return name


class _Host:
    """Rank 0: proposes a name for those who have come, until all of them have agreed to the same."""

    def __init__(self, store: Store, size: int) -> None:
        self._store, self._size = store, size
        self._proposed = ""

    def name(self) -> str | None:
        come = [_read(self._store, f"come/{rank}") for rank in range(self._size)]
        if None in come:
            return None
        name = hashlib.sha256(json.dumps(come).encode()).hexdigest()[:16]
        if name != self._proposed:
            self._store.set("name", json.dumps([name, come]))
            self._proposed = name
        if any(_read(self._store, f"agreed/{rank}") != name for rank in range(1, self._size)):
            return None
        self._store.set("begin", name)
        return name

    def missing(self) -> str:
        agreed = [_read(self._store, f"agreed/{rank}") for rank in range(self._size)]
        absent = [str(rank) for rank in range(1, self._size) if not self._proposed or agreed[rank] != self._proposed]
        return f"rank {', '.join(absent)}"


class _Guest:
    """Another rank: agrees to a name that it has a part in."""

    def __init__(self, store: Store, rank: int, mine: str) -> None:
        self._store, self._rank, self._mine = store, rank, mine
        self._agreed = ""

    def name(self) -> str | None:
        proposed = _read(self._store, "name")
        if proposed is None:
            return None
        name, come = json.loads(proposed)
        if self._rank >= len(come) or come[self._rank] != self._mine:
            return None  # of an earlier attempt, or made before this rank had come
        if name != self._agreed:
            self._store.set(f"agreed/{self._rank}", name)
            self._agreed = name
        return name if _read(self._store, "begin") == name else None

    def missing(self) -> str:
        return "some other rank" if self._agreed else "rank 0"


def _read(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
