"""From a process group of torch, or the environment that torchrun makes, to `Ranks`."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from ckpt_avg.errors import RankError
from ckpt_avg.launch import Launch, launch_of
from ckpt_avg.ranks import SILENCE, Ranks

_JOINING = 300.0  # seconds for all ranks to come


@contextlib.contextmanager
def join_ranks(group: distributed.ProcessGroup | None = None) -> Iterator[Ranks]:
    """Joins the ranks that `average` and `refresh_batch_norm` can share their work among.

    Every rank of the group must enter, and leave, together. The group may be of any backend; what the ranks say to
    each other goes through one of gloo that is made for it. Without a group the default one is taken, or where there is
    none the one that torchrun's environment describes; a process that was started alone is the only rank.

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
    with contextlib.ExitStack() as stack:
        if group is None and not (distributed.is_available() and distributed.is_initialized()):
            launch = launch_of()
            if launch is None:
                yield Ranks()
                return
            stack.enter_context(_default_group(launch))
        whole = group or distributed.group.WORLD
        with _joining(distributed.get_world_size(whole)):
            link = distributed.new_group(
                distributed.get_process_group_ranks(whole),
                timeout=datetime.timedelta(seconds=SILENCE),
                backend="gloo",
                use_local_synchronization=True,
            )
        ranks = Ranks(distributed.get_rank(link), distributed.get_world_size(link), _GroupLink(link))
        try:
            yield ranks
        except BaseException as error:
            ranks.leave(error)
            raise
        else:
            ranks.leave(None)
        finally:
            distributed.destroy_process_group(link)


@contextlib.contextmanager
def _default_group(launch: Launch) -> Iterator[None]:
    with _joining(launch.size):
        distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=_JOINING))
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _joining(size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"expected {size} ranks to find each other within {_JOINING:.0f} s, got: {reason}. Start all of them with "
            "torchrun; for a single process unset RANK and WORLD_SIZE."
        ) from error


class _GroupLink:
    """Messages as JSON over a process group of gloo: the length, then the bytes."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self._group = group

    def send(self, rank: int, message: dict[str, Any]) -> None:
        body = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        try:
            distributed.send(torch.tensor([body.numel()]), group=self._group, group_dst=rank)
            distributed.send(body, group=self._group, group_dst=rank)
        except RuntimeError as error:
            raise ConnectionError(_plainly(error)) from error

    def receive(self, rank: int) -> dict[str, Any]:
        length = torch.empty(1, dtype=torch.int64)
        try:
            distributed.recv(length, group=self._group, group_src=rank)
            body = torch.empty(int(length), dtype=torch.uint8)
            distributed.recv(body, group=self._group, group_src=rank)
        except RuntimeError as error:
            raise ConnectionError(_plainly(error)) from error
        message: dict[str, Any] = json.loads(bytes(body.tolist()))
        return message


def _plainly(error: RuntimeError) -> str:
    text = str(error)
    if "imed out" in text:
        return f"it has been silent for {SILENCE:.0f} s"
    return "its connection was closed" if "closed" in text or "reset" in text else text.splitlines()[0]
