"""How many workers a process may use."""

from __future__ import annotations

import math
import os

from ckpt_avg.errors import UsageError
from ckpt_avg.machine.control_groups import cpu_quota

_MOST = 1024


def usable_cores() -> int:
    """Returns how many cores this process may use: by its affinity, and by the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def choose_threads(threads: int | None, processes: int = 1) -> int:
    """Returns the number of workers: as asked for, or one for each usable core, shared among that many processes.

    Raises:
        UsageError: it is out of range.
    """
    if threads is None:
        return max(1, usable_cores() // processes)
    if not 1 <= threads <= _MOST:
        raise UsageError(f"--threads: expected from 1 to {_MOST:,}, got {threads:,}.")
    return threads
