"""`MappedFile`: one input file, opened once, read at checked offsets.

It promises that
- opening never blocks on a FIFO or a device, and nothing but a regular file is read;
- no read goes past the end of the file as it was when opened;
- a file that shrinks while mapped gives `ChangedWhileReadingError` instead of SIGBUS: each window is
  faulted in by ``madvise(MADV_POPULATE_READ)``, which answers EFAULT where a plain access would kill;
- pages behind the reader are given back (`release`), so that the resident set does not grow with the file.

Where the kernel lacks MADV_POPULATE_READ (Linux before 5.14, macOS, Windows) or refuses the map, bytes are
read with ``pread`` behind the same interface.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
import threading
from pathlib import Path
from types import TracebackType

from ckpt_avg.errors import ChangedWhileReadingError, CheckpointFormatError, ResourceError
from ckpt_avg.messages import quote, size

_MADV_POPULATE_READ = 22
_PAGE = mmap.PAGESIZE
_FAULT_AROUND = 64 * 1024  # Linux's default fault_around_bytes
# Without it the kernel counts a private map against memory and refuses one larger than RAM. The mmap module
# names it from Python 3.13 on; the value is that of every Linux architecture that torch has wheels for.
_MAP_NORESERVE = 0x4000


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
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ResourceError(
                    f"{path}: too many open files. Raise the limit (ulimit -n) or average fewer checkpoints."
                ) from error
            raise CheckpointFormatError(f"{path}: cannot be opened: {error.strerror}.") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            raise CheckpointFormatError(f"{path}: expected a checkpoint file, got {kind}.")
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        self._modified = status.st_mtime_ns
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._address = 0
        self._map_tried = False

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            CheckpointFormatError: the range is not inside the file, or reading fails.
        """
        buffer = bytearray(length)
        self._pread(offset, memoryview(buffer))
        return bytes(buffer)

    def buffer(self, offset: int, length: int) -> tuple[mmap.mmap | bytearray, int]:
        """Returns a buffer and the position in it where the bytes from ``offset`` begin.

        The buffer is the map itself where there is one, so nothing is copied; call `populate` on the
        range first. It must not be written to.
        """
        self._check_range(offset, length)
        if (mapped := self._mapped()) is not None:
            return mapped, offset
        copy = bytearray(length)
        self._pread(offset, memoryview(copy))
        return copy, 0

    def populate(self, offset: int, length: int) -> None:
        """Faults a range in, so that reading it from `buffer` cannot fail.

        Raises:
            ChangedWhileReadingError: the file was truncated.
            CheckpointFormatError: the storage cannot be read.
        """
        self._check_range(offset, length)
        if length and self._mapped() is not None and (code := self._advise(offset, length, _MADV_POPULATE_READ)):
            self.check_unchanged()
            raise CheckpointFormatError(f"{self.path}: reading at byte {offset:,} failed: {os.strerror(code)}.")

    def release(self, offset: int, length: int) -> None:
        """Gives the pages of a range back to the system; they can be read again."""
        if length and self._mapped() is not None:
            # The kernel maps the neighbours of a page that it faults in. Left mapped, they would add up to the file.
            start = offset - offset % _FAULT_AROUND
            end = min(self.size, -(-(offset + length) // _FAULT_AROUND) * _FAULT_AROUND)
            self._advise(start, end - start, mmap.MADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if the file's size or modification time is not what it was."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise ChangedWhileReadingError(
                f"{self.path}: changed while reading: expected {self.size:,} bytes, unmodified, got "
                f"{status.st_size:,} bytes, modified. Wait until nothing writes to it, then run again."
            )

    def close(self) -> None:
        """Closes the file. Buffers handed out stay valid as long as they are referenced."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._map = None

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
                    f"{self.path}: reading at byte {offset + done:,} failed: {error.strerror}."
                ) from error
            if count == 0:
                self.check_unchanged()
                raise ChangedWhileReadingError(f"{self.path}: ended at byte {offset + done:,} while reading.")
            done += count

    def _read_some(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [target], offset)
        with self._lock:  # Windows: no read at an offset
            os.lseek(self._fd, offset, os.SEEK_SET)
            chunk = os.read(self._fd, len(target))
        target[: len(chunk)] = chunk
        return len(chunk)

    def _mapped(self) -> mmap.mmap | None:
        if not self._map_tried:
            with self._lock:
                if not self._map_tried:
                    self._map = self._try_to_map()
                    self._map_tried = True
        return self._map

    def _try_to_map(self) -> mmap.mmap | None:
        if not _can_populate() or self.size == 0:
            return None
        try:
            # Private and writable only because torch takes no read-only buffer; nothing here writes to it.
            mapped = mmap.mmap(
                self._fd,
                self.size,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except (OSError, ValueError):
            return None  # some network and FUSE file systems refuse maps: pread serves them
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        return mapped

    def _advise(self, offset: int, length: int, advice: int) -> int:
        start = offset - offset % _PAGE
        return _madvise(self._address + start, offset + length - start, advice)

    def __repr__(self) -> str:
        return f"MappedFile({quote(self.path)}, {size(self.size)})"


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


if sys.platform == "linux":
    _LIBC = _libc()

    def _madvise(address: int, length: int, advice: int) -> int:
        # mmap.madvise keeps the interpreter lock while pages come from the disk; a ctypes call does not.
        while _LIBC.madvise(address, length, advice) != 0:
            if (code := ctypes.get_errno()) != errno.EINTR:
                return code
        return 0

    _POPULATE: list[bool] = []

    def _can_populate() -> bool:
        if not _POPULATE:
            with mmap.mmap(-1, _PAGE) as probe:
                view = ctypes.c_char.from_buffer(probe)
                _POPULATE.append(_madvise(ctypes.addressof(view), _PAGE, _MADV_POPULATE_READ) == 0)
                del view
        return _POPULATE[0]

else:

    def _madvise(address: int, length: int, advice: int) -> int:
        raise AssertionError("unreachable: nothing is mapped on this platform")

    def _can_populate() -> bool:
        return False
