"""`Descriptor`: an open input file. Of very many files, those that were used last stay open, the others rest.

A run of 400 checkpoints of 1,000 shards has more files than any system lets a process open. A file that rests is opened
again when it is needed, and must then be the same one, unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ckpt_avg.errors import ChangedWhileReadingError, CheckpointFormatError, ResourceError

_MOST = 4096  # files that stay open though nobody reads them
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Descriptor:
    """A regular file, opened for reading. Threads may share it.

    Args:
        path: the file.

    Attributes:
        path: the file.
        size: its bytes when it was opened.
        identity: its device and inode.

    Raises:
        CheckpointFormatError: it cannot be opened, or is no regular file.
        ResourceError: too many files are open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._users = 0
        self._is_closed = False
        self._fd, status = _open(path)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        self._modified = status.st_mtime_ns
        _rest(self)

    @contextlib.contextmanager
    def use(self) -> Iterator[int]:
        """Yields the descriptor, which stays open inside.

        Raises:
            ChangedWhileReadingError: the file was opened again, and is not what it was.
            CheckpointFormatError, ResourceError: it could not be opened again.
        """
        with _IDLE_LOCK:
            _IDLE.pop(self, None)
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.path} is closed")
            if self._fd < 0:
                self._reopen()
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                is_idle = self._users == 0 and not self._is_closed
            if is_idle:
                _rest(self)

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if the file's size or modification time is not what it was."""
        with self.use() as fd:
            self._refuse_changed(_status(fd, self.path))

    def close(self) -> None:
        """Closes the file for good."""
        with _IDLE_LOCK:
            _IDLE.pop(self, None)
        with self._lock:
            self._is_closed = True
            self._close()

    def park(self) -> None:
        """Closes the file until it is used again, unless it is being used."""
        if self._lock.acquire(blocking=False):  # whoever holds it is using the file, or about to
            try:
                if self._users == 0:
                    self._close()
            finally:
                self._lock.release()

    def _close(self) -> None:
        if self._fd >= 0:
            descriptor, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # nothing was written, and the descriptor is gone either way
                os.close(descriptor)

    def _reopen(self) -> None:
        fd, status = _open(self.path)
        try:
            if (status.st_dev, status.st_ino) != self.identity:
                raise ChangedWhileReadingError(
                    f"{self.path}: changed while reading: expected the file that was opened at first, got another one. "
                    "Wait until nothing writes to it, then run again."
                )
            self._refuse_changed(status)
        except ChangedWhileReadingError:
            os.close(fd)
            raise
        self._fd = fd

    def _refuse_changed(self, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise ChangedWhileReadingError(
                f"{self.path}: changed while reading: expected {self.size:,} bytes, unmodified, got "
                f"{status.st_size:,} bytes, modified. Wait until nothing writes to it, then run again."
            )


# What is open and not being used, the longest unused first.
_IDLE: OrderedDict[Descriptor, None] = OrderedDict()
_IDLE_LOCK = threading.Lock()


def park_idle() -> bool:
    """Closes all files that are not being used; returns whether there were any."""
    with _IDLE_LOCK:
        parked = list(_IDLE)
        _IDLE.clear()
    for descriptor in parked:
        descriptor.park()
    return bool(parked)


def _rest(descriptor: Descriptor) -> None:
    with _IDLE_LOCK:
        _IDLE[descriptor] = None
        excess = len(_IDLE) - _room(len(_IDLE))
        parked = [_IDLE.popitem(last=False)[0] for _ in range(excess)]
    for each in parked:
        each.park()


if sys.platform == "win32":

    def _room(count: int) -> int:
        return _MOST

else:
    import resource

    def _room(count: int) -> int:
        """Returns how many files may stay open; half of the limit, which is raised if so many are there."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * _MOST if hard == resource.RLIM_INFINITY else min(2 * _MOST, hard)
        if soft != resource.RLIM_INFINITY and count > soft // 2 and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # not here; then fewer stay open
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
        return _MOST if soft == resource.RLIM_INFINITY else min(_MOST, soft // 2)


def _open(path: Path) -> tuple[int, os.stat_result]:
    """Opens a regular file; neither a FIFO nor a device can make it wait."""
    fd = _open_any(path)
    try:
        status = _status(fd, path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            raise CheckpointFormatError(
                f"{path}: expected a checkpoint file, got {kind}. Name a file, or a folder of checkpoints."
            )
    except CheckpointFormatError:
        os.close(fd)
        raise
    return fd, status


def _open_any(path: Path) -> int:
    while True:
        try:
            return os.open(path, _FLAGS)
        except OSError as error:  # noqa: PERF203 (it goes round only while files can be closed)
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise CheckpointFormatError(
                    f"{path}: cannot be opened: {error.strerror}. Check its permissions and kind."
                ) from error
            if not park_idle():
                raise ResourceError(
                    f"{path}: too many open files. Raise the limit (ulimit -n) or use fewer --threads."
                ) from error


def _status(fd: int, path: Path) -> os.stat_result:
    try:
        return os.fstat(fd)
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be looked at: {error.strerror}. Check its disk.") from error
