"""`MappedFile`: one input file, opened once, read at checked offsets.

It promises that
- opening never blocks on a FIFO or a device, and nothing but a regular file is read;
- no read goes past the end of the file as it was when opened;
- a file that shrinks while mapped gives `ChangedWhileReadingError` instead of SIGBUS: each window is faulted in by
  ``madvise(MADV_POPULATE_READ)``, which answers EFAULT where a plain access would kill the process. A truncation
  between that and the last use of the window is caught by the command (`bus_errors`); in a program that calls this
  package it still kills.
- a window is unmapped as soon as nothing refers to it, so the resident set does not grow with the file. One map of
  the whole file, with MADV_DONTNEED behind the reader, does not achieve that: the kernel maps whole folios, up to
  2 MiB, and what lies outside the range that is given back stays resident.

Where the kernel lacks MADV_POPULATE_READ (Linux before 5.14, macOS, Windows) or refuses the map, on storage across a
network, where each page fault is a round trip, and for windows too small to be worth a map, bytes are read with
``pread`` behind the same interface.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ckpt_avg.errors import ChangedWhileReadingError, CheckpointFormatError, ResourceError, UsageError
from ckpt_avg.files.descriptors import Descriptor, park_idle
from ckpt_avg.files.hints import prefetch, remote_kind
from ckpt_avg.files.sigbus import watch
from ckpt_avg.text import quote, size

IO = Literal["auto", "mmap", "pread"]

_WAYS: dict[str, IO] = {"auto": "auto", "mmap": "mmap", "pread": "pread"}

_MADV_POPULATE_READ = 22
_SMALL = 512 * 1024  # bytes below which copying is cheaper than mapping, faulting in and unmapping


@dataclass(frozen=True, slots=True)
class Window:
    """A range of a file, in memory while this object or a view of its buffer lives. It must not be written to.

    Attributes:
        buffer: holds the bytes.
        position: where in the buffer the range begins.
        offset: where in the file the range begins.
    """

    buffer: mmap.mmap | bytearray
    position: int
    offset: int


class MappedFile:
    """A regular file, opened for reading. Threads may share it.

    Args:
        path: the file.

    Raises:
        CheckpointFormatError: it cannot be opened, or is no regular file.
        ResourceError: too many files are open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = Descriptor(path)
        self.size = self._descriptor.size
        self.identity = self._descriptor.identity
        self._lock = threading.Lock()
        self.read_by("auto")

    def read_by(self, io: IO) -> None:
        """Says how windows come: by maps, by ``pread``, or as suits the storage, which is what they do at first.

        Raises:
            ResourceError: this system has no maps that can be faulted in safely.
        """
        if io == "mmap" and not _can_populate():
            raise ResourceError("--io mmap: expected a kernel with MADV_POPULATE_READ (Linux 5.14). Use --io auto.")
        self._must_map = io == "mmap"
        self._can_map = self._must_map or (io == "auto" and _can_populate())
        self._is_known_local = io != "auto"

    def prefetch(self, offset: int, length: int) -> None:
        """Asks the system to bring a range into memory meanwhile. A window of it may then be had without waiting."""
        with self._descriptor.use() as fd:
            prefetch(fd, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            CheckpointFormatError: the range is not inside the file, or reading fails.
        """
        self._check_range(offset, length)
        buffer = bytearray(length)
        self._pread(offset, memoryview(buffer))
        return bytes(buffer)

    def window(self, offset: int, length: int) -> Window:
        """Returns a range of the file, faulted in, so that reading it cannot fail any more.

        Raises:
            ChangedWhileReadingError: the file was truncated.
            CheckpointFormatError: the range is not inside the file, or the storage cannot be read.
        """
        self._check_range(offset, length)
        if self._can_map and length >= _SMALL and (mapped := self._map(offset, length)) is not None:
            return mapped
        copy = bytearray(length)
        self._pread(offset, memoryview(copy))
        return Window(copy, 0, offset)

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if the file's size or modification time is not what it was."""
        self._descriptor.check_unchanged()

    def close(self) -> None:
        """Closes the file. Windows stay valid as long as they are referenced."""
        self._descriptor.close()

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointFormatError(
                f"{self.path}: expected {length:,} bytes at byte {offset:,}, got a file of {self.size:,} bytes. "
                "It is truncated or damaged: copy it again."
            )

    def _pread(self, offset: int, target: memoryview) -> None:
        self._check_range(offset, len(target))
        done = 0
        while done < len(target):
            try:
                count = self._read_some(target[done:], offset + done)
            except OSError as error:
                raise CheckpointFormatError(
                    f"{self.path}: reading at byte {offset + done:,} failed: {error.strerror}. Check the disk."
                ) from error
            if count == 0:
                self.check_unchanged()
                raise ChangedWhileReadingError(
                    f"{self.path}: ended at byte {offset + done:,} while reading. Run again once nothing writes to it."
                )
            done += count

    def _read_some(self, target: memoryview, offset: int) -> int:
        with self._descriptor.use() as fd:
            if hasattr(os, "preadv"):
                return os.preadv(fd, [target], offset)
            with self._lock:  # Windows: no read at an offset
                os.lseek(fd, offset, os.SEEK_SET)
                chunk = os.read(fd, len(target))
        target[: len(chunk)] = chunk
        return len(chunk)

    def _map(self, offset: int, length: int) -> Window | None:
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self._descriptor.use() as fd:
                if not self._is_known_local:
                    self._is_known_local = True
                    if remote_kind(fd) is not None:
                        self._can_map = False
                        return None
                mapped = _mapped(fd, begin, offset + length - begin)
        except ValueError:
            self.check_unchanged()  # the map was found to reach past the end of the file
            raise
        except OSError as error:
            if self._must_map:
                raise ResourceError(
                    f"{self.path}: --io mmap: the system refused to map it: {error.strerror}. Use --io auto."
                ) from error
            self._can_map = False  # some network and FUSE file systems refuse maps: pread serves them
            return None
        if code := _populate(mapped):
            self.check_unchanged()
            raise CheckpointFormatError(
                f"{self.path}: reading at byte {offset:,} failed: {os.strerror(code)}. Check the storage."
            )
        return Window(mapped, offset - begin, offset)

    def __repr__(self) -> str:
        return f"MappedFile({quote(self.path)}, {size(self.size)})"


def check_io(io: str) -> IO:
    """Returns how to read.

    Raises:
        UsageError: there is no such way.
    """
    if io not in _WAYS:
        raise UsageError(f"--io: expected one of {', '.join(_WAYS)}, got {io!r}.")
    return _WAYS[io]


def _mapped(fd: int, begin: int, length: int) -> mmap.mmap:
    """Returns a map, private and writable only because torch takes no read-only buffer; nothing here writes to it."""
    while True:
        try:
            flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(fd, length, flags=flags, prot=access, offset=begin, **_WITHOUT_DESCRIPTOR)
        except OSError as error:  # noqa: PERF203 (it goes round only while files can be closed)
            if error.errno != errno.EMFILE or not park_idle():
                raise


# A map needs no descriptor of its own; Python can be told so from 3.13 on.
_WITHOUT_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


if sys.platform == "linux":
    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def _populate(mapped: mmap.mmap) -> int:
        # mmap.madvise keeps the interpreter lock while pages come from the disk; a ctypes call does not.
        first = ctypes.c_char.from_buffer(mapped)
        watch(mapped, ctypes.addressof(first))
        while _LIBC.madvise(ctypes.addressof(first), len(mapped), _MADV_POPULATE_READ) != 0:
            if (code := ctypes.get_errno()) != errno.EINTR:
                return code
        return 0

    @functools.cache
    def _can_populate() -> bool:
        return _populate(mmap.mmap(-1, mmap.PAGESIZE)) == 0

else:

    def _populate(mapped: mmap.mmap) -> int:
        return errno.ENOSYS

    def _can_populate() -> bool:
        return False
