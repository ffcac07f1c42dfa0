"""Worker threads: how many fit the cores of this machine, how they share work, and the garbage collector paused."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")

_CGROUPS = Path("/sys/fs/cgroup")


def choose_threads(threads: int | None, processes: int = 1, most: int | None = None) -> int:
    """Returns ``threads``; by default the usable cores, shared by the processes on this machine, or ``most``."""
    if threads is not None:
        return threads
    each = max(1, usable_cores() // processes)
    return each if most is None else min(each, most)


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


class SharedItems(Iterator[Item], Generic[Item]):
    """An iterator that several threads share: each item goes to one of them."""

    def __init__(self, items: Iterable[Item], stop: threading.Event) -> None:
        self._items, self._stop, self._lock = iter(items), stop, threading.Lock()

    def __next__(self) -> Item:
        with self._lock:
            self.check()
            return next(self._items)

    def check(self) -> None:
        """Raises CancelledError if another worker has failed, or the caller was interrupted."""
        if self._stop.is_set():
            raise CancelledError


def run_workers(threads: int, items: Iterable[Item], work: Callable[[SharedItems[Item]], None]) -> None:
    """Calls ``work(items)`` in so many threads, which share the items, and raises the first error of any.

    If one fails, the others get CancelledError instead of their next item.
    """
    stop = threading.Event()
    shared = SharedItems(items, stop)
    with ThreadPoolExecutor(threads, thread_name_prefix="worker") as pool:
        try:
            futures = [pool.submit(work, shared) for _ in range(threads)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for error in (future.exception() for future in futures):
        if error is not None and not isinstance(error, CancelledError):
            raise error


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
