"""How many workers fit the cores of this machine, and the garbage collector paused."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt_avg.errors import UsageError

_MOST_THREADS = 1024
_CGROUPS = Path("/sys/fs/cgroup")


def choose_threads(threads: int | None, processes: int = 1) -> int:
    """Returns ``threads``, or one for each usable core, divided by the number of processes on this machine.

    Raises:
        UsageError: ``threads`` is out of range.
    """
    if threads is None:
        return max(1, usable_cores() // processes)
    if not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"--threads: expected from 1 to {_MOST_THREADS:,}, got {threads:,}.")
    return threads


def usable_cores() -> int:
    """Returns how many cores this process may use, by its affinity and by the CPU quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota() -> float:
    """Returns how many cores' time this process may use; infinity if there is no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf  # no control groups here
    quotas = [math.inf]
    for line in lines:
        _, controllers, name = line.split(":", 2)  # version 2 has one line without controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        own = root / name.lstrip("/")
        quotas += [_quota_of(folder, controllers) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return min(quotas)


def _quota_of(folder: Path, controllers: str) -> float:
    try:
        if controllers:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return math.inf  # no limit, or another group's folder that a container does not show
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Switches the cyclic garbage collector off inside, and on again afterwards if it was on.

    Tables of headers are hundreds of thousands of objects without cycles, and each full collection visits all of them:
    with 100,000 tensors that took a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
