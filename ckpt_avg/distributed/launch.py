"""The ranks that a launcher such as torchrun has started: what the environment says of this one, and `join_ranks`."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt_avg.distributed.ranks import RANK_TIMEOUT, Ranks, connect_ranks, torchrun_holds_store
from ckpt_avg.errors import RankError, UsageError

if TYPE_CHECKING:
    from torch import distributed


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
        raise UsageError(f"expected the numbers of a rank as torchrun sets them, got {found}. Start with torchrun.")
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
    if timeout <= 0:
        raise UsageError(f"--rank-timeout: expected more than 0 seconds, got {timeout:g}.")
    first: BaseException | None = None
    ranks = Ranks()
    try:
        with contextlib.ExitStack() as stack:
            ranks = _enter(stack, group, timeout)
            try:
                yield ranks
            except BaseException as error:
                first = error
                ranks.leave(error)
                raise
            ranks.leave()
    except BaseException as error:
        # A launcher's signal, also one that comes while this rank stops, does not hide why the ranks stop.
        if ranks.explains(error):
            raise ranks.stopped() from error
        if first is not None and not isinstance(error, Exception):
            raise first from (None if error is first else error)
        raise


def _enter(stack: contextlib.ExitStack, group: distributed.ProcessGroup | None, timeout: float) -> Ranks:
    launch = launch_of()
    if group is None and launch is None and "torch" not in sys.modules:
        return Ranks()
    from torch import distributed

    if group is None and not (distributed.is_available() and distributed.is_initialized()):
        return Ranks() if launch is None else _from_environment(stack, launch, timeout)
    c10d: Any = distributed.distributed_c10d
    group = group or c10d.GroupMember.WORLD
    rank, members = distributed.get_rank(group), distributed.get_process_group_ranks(group)
    if rank < 0:
        raise UsageError("join_ranks: this process is not in the group. Call it on the group's members only.")
    # torch has no public way to a store that all of them reach.
    store = c10d.PrefixStore(f"ckpt_avg/{members}", c10d._get_default_store())
    with _joining(len(members), timeout):
        return connect_ranks(store, rank, len(members), timeout)


def _from_environment(stack: contextlib.ExitStack, launch: Launch, timeout: float) -> Ranks:
    """Makes the default group, too: the user's code may use it, as a `DistributedSampler` does."""
    from torch import distributed

    c10d: Any = distributed
    with _joining(launch.size, timeout):
        store = c10d.PrefixStore("ckpt_avg", _store_of(launch, timeout))
        ranks = connect_ranks(store, launch.rank, launch.size, timeout)
        seconds = datetime.timedelta(seconds=timeout)
        distributed.init_process_group(
            "gloo", store=ranks.store, rank=launch.rank, world_size=launch.size, timeout=seconds
        )
    stack.callback(distributed.destroy_process_group)
    return ranks


@functools.cache
def _store_of(launch: Launch, timeout: float) -> Any:
    """Connects to the store that the environment names. It stays until the process ends, since rank 0 may serve it."""
    from torch import distributed

    c10d: Any = distributed  # the stores have no annotations
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        found = ", ".join(f"{name}={os.environ.get(name)!r}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UsageError(
            f"expected the address of rank 0 as torchrun sets it, got {found}. Start with torchrun; for "
            "a single process unset RANK and WORLD_SIZE."
        ) from None
    serves = launch.rank == 0 and not torchrun_holds_store()
    deadline = time.monotonic() + timeout
    attempt = datetime.timedelta(seconds=2)  # in which no signal is heard
    while True:
        try:
            store = c10d.TCPStore(
                host, port, is_master=serves, timeout=attempt, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError:  # noqa: PERF203 (rank 0 may come later)
            if serves or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            store.set_timeout(datetime.timedelta(seconds=timeout))
            return store


@contextlib.contextmanager
def _joining(size: int, timeout: float) -> Iterator[None]:
    """Turns errors of torch into RankError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RankError(
            f"expected {size} ranks to join within {timeout:g} s, got: {reason}. Start all of them with torchrun; for "
            "a single process unset RANK and WORLD_SIZE."
        ) from error
