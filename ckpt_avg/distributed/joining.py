"""From a process group of torch, or the environment that torchrun makes, to `Ranks`."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from ckpt_avg.distributed import ranks as ranks_module
from ckpt_avg.distributed.launch import Launch, launch_of
from ckpt_avg.distributed.meeting import meet
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import RankError, UsageError

_C10D: Any = distributed  # its stores and groups have no type annotations
_JOINING = 300.0  # seconds for all ranks to come
_ATTEMPT = 2.0  # seconds of one attempt to connect, during which no signal is heard


@contextlib.contextmanager
def join_ranks(group: distributed.ProcessGroup | None = None) -> Iterator[Ranks]:
    """Joins the ranks that `average` and `refresh_batch_norm` can share their work among.

    Every rank of the group must enter, and leave, together. The group may be of any backend; what the ranks say to
    each other goes through connections of gloo that are made for it. Without a group the default one is taken, or
    where there is none the one that torchrun's environment describes; a process that was started alone is the only
    rank.

    Raises:
        RankError: the others did not come; or another one failed inside, in place of a signal that this caused.
        UsageError: the environment makes no sense.

    Example:
        >>> from ckpt_avg import average
        >>> with join_ranks() as ranks:
        ...     result = average("fixtures/mnist_cnn", "release.safetensors", bn="keep", dry_run=True, ranks=ranks)
        >>> ranks.size
        1
    """
    ranks = Ranks()
    first: BaseException | None = None
    try:
        with contextlib.ExitStack() as stack:
            if group is None and not (distributed.is_available() and distributed.is_initialized()):
                launch = launch_of()
                if launch is None:
                    yield ranks
                    return
                stack.enter_context(_default_group(launch))
            ranks = _ranks_of(group)
            try:
                yield ranks
            except BaseException as error:
                first = error
                ranks.leave(error)
                raise
            ranks.leave(None)
    except BaseException as error:
        # A launcher's signal that comes while this rank stops does not take the place of why it stops.
        if ranks.explains(error):
            raise ranks.stopped() from error
        if first is not None and not isinstance(error, Exception):
            raise first from (None if error is first else error)
        raise


def _ranks_of(group: distributed.ProcessGroup | None) -> Ranks:
    group = group or distributed.group.WORLD
    rank, members = distributed.get_rank(group), distributed.get_process_group_ranks(group)
    if rank < 0:
        raise UsageError("join_ranks: expected a group that this process is in, got another one.")
    with _joining(len(members)):
        # torch gives no other way to a store that all members reach.
        store = _C10D.PrefixStore(f"ckpt_avg/{members}", distributed.distributed_c10d._get_default_store())
        return Ranks(rank, len(members), _Pairs(store, meet(store, rank, len(members), _JOINING), rank, len(members)))


@contextlib.contextmanager
def _default_group(launch: Launch) -> Iterator[None]:
    """The default group: for the user's code, a sampler that takes its part of the data, say."""
    with _joining(launch.size):
        store = _store_of(launch)
        name = meet(_C10D.PrefixStore("ckpt_avg", store), launch.rank, launch.size, _JOINING)
        distributed.init_process_group(
            "gloo",
            store=_C10D.PrefixStore(f"ckpt_avg/{name}", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=datetime.timedelta(seconds=_JOINING),
        )
    try:
        yield
    finally:
        distributed.destroy_process_group()


@functools.cache
def _store_of(launch: Launch) -> Any:
    """Returns the store that the environment names. It is kept until the process ends, since rank 0 may serve it."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        found = ", ".join(f"{name}={os.environ.get(name)!r}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UsageError(
            f"expected the address of rank 0 as torchrun sets it, got {found}. Start with torchrun; for "
            "a single process unset RANK and WORLD_SIZE."
        ) from None
    serves = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + _JOINING
    while True:
        try:
            store = _C10D.TCPStore(
                host,
                port,
                is_master=serves,
                timeout=datetime.timedelta(seconds=_ATTEMPT),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError:  # noqa: PERF203 (rank 0 may come later)
            if serves or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            store.set_timeout(datetime.timedelta(seconds=_JOINING))
            return store


@contextlib.contextmanager
def _joining(size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RankError(
            f"expected {size} ranks to find each other within {_JOINING:.0f} s, got: {reason}. Start all of them with "
            "torchrun; for a single process unset RANK and WORLD_SIZE."
        ) from error


class _Pairs:
    """Messages as JSON, the length, then the bytes, over one connection of gloo for rank 0 and each other rank.

    Pairs, since a group of more closes all connections where one of them fails.
    """

    def __init__(self, store: Any, name: str, rank: int, size: int) -> None:
        silence = datetime.timedelta(seconds=ranks_module.SILENCE)
        self._own = int(rank != 0)
        self._pairs = {
            peer: _C10D.ProcessGroupGloo(_C10D.PrefixStore(f"{name}/{max(rank, peer)}", store), self._own, 2, silence)
            for peer in (range(1, size) if rank == 0 else [0])
        }

    def send(self, rank: int, message: dict[str, Any]) -> None:
        body = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        try:
            self._pairs[rank].send([torch.tensor([body.numel()])], 1 - self._own, 0).wait()
            self._pairs[rank].send([body], 1 - self._own, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(_plainly(error)) from error

    def receive(self, rank: int) -> dict[str, Any]:
        length = torch.empty(1, dtype=torch.int64)
        try:
            self._pairs[rank].recv([length], 1 - self._own, 0).wait()
            body = torch.empty(int(length), dtype=torch.uint8)
            self._pairs[rank].recv([body], 1 - self._own, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(_plainly(error)) from error
        message: dict[str, Any] = json.loads(bytes(body.tolist()))
        return message


def _plainly(error: RuntimeError) -> str:
    text = str(error)
    if "imed out" in text:
        return f"it has been silent for {ranks_module.SILENCE:.0f} s"
    return "its connection was closed" if "closed" in text or "reset" in text else text.splitlines()[0]
