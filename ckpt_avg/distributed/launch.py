"""The ranks that a launcher such as torchrun has started: what the environment says of this one, and `join_ranks`."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_avg.distributed.ranks import RANK_TIMEOUT, Ranks
from ckpt_avg.errors import RankError, UsageError
from ckpt_avg.wording import either

if TYPE_CHECKING:
    from torch import distributed

_ADVICE = "Start all ranks with torchrun; for a single process unset RANK and WORLD_SIZE."
_joins: Counter[str] = Counter()  # how often these ranks have joined


@dataclass(frozen=True, slots=True)
class Launch:
    """The rank of this process and the number of ranks: of all, and of those on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Returns the rank that the environment gives this process; None if it is the only one.

    Raises:
        UsageError: the variables are not numbers, or contradict each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local_rank = (int(environment.get(name, "0")) for name in names[:3])
        local_size = int(environment.get("LOCAL_WORLD_SIZE", local_rank + 1))  # not every launcher sets it
    except ValueError:
        rank, size, local_rank, local_size = -1, 0, 0, 0
    if not 0 <= rank < size or not 0 <= local_rank < local_size:
        found = ", ".join(f"{name}={environment[name]!r}" for name in names if name in environment)
        raise UsageError(f"{found}: not the numbers of a rank as torchrun sets them. {_ADVICE}")
    return Launch(rank, size, local_rank, local_size) if size > 1 else None


def launched_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Returns this process's rank for messages; None for a single process or invalid variables."""
    try:
        launch = launch_of(environment)
    except UsageError:
        return None
    return None if launch is None else launch.rank


@contextlib.contextmanager
def join_ranks(group: distributed.ProcessGroup | None = None, *, timeout: float = RANK_TIMEOUT) -> Iterator[Ranks]:
    """Joins the ranks that `average` and `refresh_batch_norm` share their work among.

    Every rank of the group must enter and leave. The group may have any backend: the ranks get gloo connections of
    their own. Without a group, the default group is used, or made from the variables that torchrun sets. A process that
    was started alone is the only rank; then `torch.distributed` is not used.

    Args:
        group: the processes that share the work.
        timeout: seconds for which a rank that waits accepts no sign of life from another one. Ranks give one at each
            step, and during the mean, after each batch of the refresh and before each evaluation.

    Raises:
        RankError: the others did not join; or another rank failed, and a signal stopped this one because of it.
        UsageError: the environment contradicts itself, or this process is not in the group.

    Example:
        >>> from ckpt_avg import average
        >>> with join_ranks() as ranks:
        ...     result = average("fixtures/mnist_cnn", "release.safetensors", bn="keep", dry_run=True, ranks=ranks)
        >>> ranks.size
        1
    """
    if not timeout > 0:
        name = either("--rank-timeout", "timeout")
        raise UsageError(f"{name}: {timeout:g} is out of range. Use more than 0 seconds, for example 1800.")
    ranks, first = Ranks(), None
    try:
        with contextlib.ExitStack() as stack:
            ranks = _enter(stack, group, timeout)
            try:
                yield ranks
            except BaseException as error:
                first = error
                raise
            finally:
                ranks.leave(first)
    except BaseException as error:
        # A launcher's signal, also one that comes while this rank stops, does not hide why the ranks stop.
        if ranks.explains(error):
            raise ranks.stopped() from error
        if first is not None and first is not error and not isinstance(error, Exception):
            raise first from error
        raise


def _enter(stack: contextlib.ExitStack, group: distributed.ProcessGroup | None, timeout: float) -> Ranks:
    group = group or _default_group()
    launch = launch_of() if group is None else None
    if group is None and launch is None:
        return Ranks()
    from torch import distributed

    c10d: Any = distributed.distributed_c10d
    try:
        if launch is not None:
            rank, group_ranks, store = launch.rank, list(range(launch.size)), _store_of(launch, timeout)
        else:
            rank, group_ranks = distributed.get_rank(group), distributed.get_process_group_ranks(group)
            store = c10d._get_default_store()  # torch has no public way to a store that all of them reach
        if rank < 0:
            raise UsageError("join_ranks: this process is not in the group. Call it only in processes of the group.")
        # torchrun may keep the store when it starts the ranks again.
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{group_ranks}"
        _joins[attempt] += 1
        store = c10d.PrefixStore(f"ckpt_avg/{attempt}/{_joins[attempt]}", store)
        ranks = Ranks(rank, len(group_ranks), store, timeout)
        ranks.connect()
        if launch is not None:  # the user's code may use the default group, as a DistributedSampler does
            seconds = datetime.timedelta(seconds=timeout)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks.size, timeout=seconds)
            stack.callback(distributed.destroy_process_group)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RankError(f"the ranks could not be connected: {reason}. {_ADVICE}") from error
    return ranks


def _default_group() -> Any:
    if "torch" in sys.modules:  # otherwise nobody has made one
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.group.WORLD
    return None


@functools.cache
def _store_of(launch: Launch, timeout: float) -> Any:
    """Connects to the store that the environment names. It stays until the process ends, since rank 0 may serve it."""
    from torch import distributed

    c10d: Any = distributed  # the stores have no annotations
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        found = ", ".join(f"{name}={os.environ.get(name)!r}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UsageError(f"{found}: not the address of rank 0 as torchrun sets it. {_ADVICE}") from None
    serves = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + timeout
    attempt = datetime.timedelta(seconds=2)  # in which no signal is heard
    while True:
        try:
            store = c10d.TCPStore(host, port, None, serves, attempt, wait_for_workers=False, multi_tenant=True)
        except RuntimeError:  # noqa: PERF203 (rank 0 may come later)
            if serves or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            store.set_timeout(datetime.timedelta(seconds=timeout))
            return store
