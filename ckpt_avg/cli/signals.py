"""Signals end the command by an exception in its main thread, so that everything is cleaned up.

An import may lose such an exception: C code that registers its classes, or tries whether numpy is there, drops any, and
one inside the import system may leave a lock behind. So a signal is put off while Python's own modules run, which is
soon over; and one that was raised inside an import is raised again, unless it is on its way.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType

_SOON = 0.02  # seconds
_TIMES = 100  # that a signal is put off


class Terminated(BaseException):
    """SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """Turns SIGTERM and SIGHUP into an exception, as Python does with SIGINT. A second Ctrl-C ends the process at once.

    Attributes:
        dropped: the exception of a signal that an import may have dropped; what else ends the command is its result.
    """

    def __init__(self) -> None:
        self.dropped: KeyboardInterrupt | Terminated | None = None
        self._owner = os.getpid()
        self._pending: int | None = None  # a signal that will come again
        self._put_off = 0
        self._is_over = False

    def __enter__(self) -> Signals:
        numbers = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
        # A signal that the caller ignores (nohup) stays ignored.
        self._before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if self._before[number] is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending is not None:
            self.dropped = _exception(self._pending)
            if error is None:
                raise self.dropped

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked dataloader worker has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._pending = None
        files = _files(frame)
        if files and files[0].startswith("<frozen ") and self._put_off < _TIMES and self._ask_again(number):
            self._put_off += 1
            return
        if self.dropped is None or not _is_handled(self.dropped):
            error = _exception(number)
            if any(file.startswith("<frozen importlib.") for file in files) and self._ask_again(number):
                self.dropped = error
            else:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise error
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _ask_again(self, number: int) -> bool:
        with contextlib.suppress(RuntimeError):  # no memory for a thread
            # Not of `threading`, whose locks the interrupted code may hold.
            _thread.start_new_thread(self._send, (number,))
            self._pending = number
            return True
        return False

    def _send(self, number: int) -> None:
        """Sends this process a signal, which its main thread hears even while it waits."""
        time.sleep(_SOON)
        if self._is_over:
            return
        if sys.platform == "win32":
            signal.raise_signal(number)  # os.kill would end the process
        else:
            os.kill(self._owner, number)


def _exception(number: int) -> KeyboardInterrupt | Terminated:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def _files(frame: FrameType | None) -> list[str]:
    """Returns the files of a frame and of those that called it."""
    found = []
    while frame is not None:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return found


def _is_handled(error: BaseException) -> bool:
    """Whether an exception, or one that came while it was handled, is being handled in this thread."""
    found = sys.exc_info()[1]
    while found is not None and found is not error:
        found = found.__context__
    return found is error
