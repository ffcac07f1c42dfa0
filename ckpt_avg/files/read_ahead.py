"""Loads inputs ahead of the workers: the storage then has many requests at a time, however many cores there are."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType

from ckpt_avg.files.input_file import InputFile

REQUEST = 1024 * 1024  # bytes

Span = tuple[InputFile, int, int]  # file, first byte, byte after the last


class ReadAhead:
    """Threads that bring parts of files into the page cache, in the order in which they are asked for.

    Args:
        readers: how many; 0 reads nothing ahead.
        request: how many bytes one of them asks for at a time.
    """

    def __init__(self, readers: int, request: int = REQUEST) -> None:
        self._request = request
        self._requests: queue.SimpleQueue[Span | None] = queue.SimpleQueue()
        self._is_over = False
        self._readers = readers
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def ask(self, inputs: Iterable[Sequence[Span]]) -> None:
        """Asks for parts of several inputs that are used together: a request of each in turn."""
        if not self._readers:
            return
        each_input = ([cut for span in spans for cut in _cut(span, self._request)] for spans in inputs)
        requests = [request for turn in itertools.zip_longest(*each_input) for request in turn if request is not None]
        for request in requests:
            self._requests.put(request)
        with self._lock:  # a worker that Ctrl-C has cut off from its pool may still ask when all is over
            if not self._is_over:
                self._start(min(len(requests), self._readers - len(self._threads)))

    def _start(self, number: int) -> None:
        for _ in range(number):
            thread = threading.Thread(target=self._read, name="reader")
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads, or no memory for them: fewer read ahead
                self._readers = len(self._threads)
                return
            self._threads.append(thread)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_over = True
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        while (request := self._requests.get()) is not None:
            if not self._is_over:
                file, begin, end = request
                file.load(begin, end - begin)


def _cut(span: Span, request: int) -> list[Span]:
    file, begin, end = span
    return [(file, first, min(end, first + request)) for first in range(begin, end, request)]
