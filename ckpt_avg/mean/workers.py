"""Worker threads that share a list of items and stop together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Item = TypeVar("Item")


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
        futures = [pool.submit(work, shared) for _ in range(threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for error in (future.exception() for future in futures):
        if error is not None and not isinstance(error, CancelledError):
            raise error
