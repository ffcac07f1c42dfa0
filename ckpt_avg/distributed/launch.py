"""What a launcher such as torchrun says of this process, in its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_avg.errors import UsageError


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher said of this process.

    Attributes:
        rank, size: its number among how many.
        local_rank, local_size: the same, counting those on this machine alone.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Returns what the environment says of this process's rank; None where it is the only one.

    Raises:
        UsageError: the variables are no numbers, or contradict each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local_rank = (int(environment.get(name, "0")) for name in names[:3])
        local_size = int(environment.get("LOCAL_WORLD_SIZE", local_rank + 1))  # not every launcher tells
    except ValueError:
        rank, size, local_rank, local_size = -1, 0, 0, 0
    if not 0 <= rank < size or not 0 <= local_rank < local_size:
        found = ", ".join(f"{name}={environment[name]!r}" for name in names if name in environment)
        raise UsageError(f"expected the numbers of a rank as torchrun sets them, got {found}. Start with torchrun.")
    return Launch(rank, size, local_rank, local_size) if size > 1 else None


def launched_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Returns this process's rank for messages; None where there is one process, or the variables make no sense."""
    try:
        launch = launch_of(environment)
    except UsageError:
        return None
    return None if launch is None else launch.rank
