"""`InputFile`: one input file, opened once and read at checked offsets.

It promises:
- Opening never blocks on a FIFO or a device, and only regular files are read.
- No read goes past the end that the file had when it was opened.
- A file that shrinks while it is mapped gives `ChangedWhileReadingError` instead of SIGBUS: each mapping is faulted in
  with ``madvise(MADV_POPULATE_READ)``, which returns EFAULT where a plain access would end the process. `sigbus`
  catches a later truncation in the command; a program that calls this package is ended by it.
- A mapping is unmapped as soon as nothing refers to it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from ckpt_avg.errors import (
    ChangedWhileReadingError,
    CheckpointFormatError,
    ResourceError,
    TooManyFilesError,
    fail,
)
from ckpt_avg.files import platform
from ckpt_avg.text import quote, size

IO = Literal["auto", "mmap", "pread"]

_SMALL = 512 * 1024  # bytes below which copying is cheaper than mapping, faulting in and unmapping
_RESERVE = 64  # descriptors that inputs leave to the output, mappings and the rest of the process
_TRUNCATED = "It is truncated or damaged: copy it again"


@dataclass(frozen=True, slots=True)
class FileMapping:
    """A range of a file in memory, as long as this object or a view of its buffer exists. It must not be written to.

    Attributes:
        buffer: contains the bytes.
        position: the index in the buffer at which the range begins.
        offset: the byte of the file at which the range begins.
    """

    buffer: mmap.mmap | bytearray
    position: int
    offset: int


class InputFile:
    """A regular file, opened for reading. Threads may share it.

    Attributes:
        path: the file.
        size: its bytes when it was opened.
        identity: its device and inode.

    Raises:
        CheckpointFormatError: it cannot be opened, or is not a regular file.
        ResourceError: too many files are open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd, status = _open(path)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        self._modified = status.st_mtime_ns
        self.use_io("auto")

    def use_io(self, io: IO) -> None:
        """Chooses how `map` reads the file: `mmap`, `pread`, or `auto` (the default), which depends on the file system.

        Raises:
            ResourceError: this system has no mappings that can be faulted in safely.
        """
        if io == "mmap" and not platform.can_map():
            raise ResourceError("--io mmap: needs a kernel with MADV_POPULATE_READ (Linux 5.14). Use --io auto.")
        self._must_map = io == "mmap"
        self._can_map = self._must_map or (io == "auto" and platform.can_map())
        self._is_known_local = io != "auto"

    def prefetch(self, offset: int, length: int) -> None:
        """Asks the system to load a range into memory in the background."""
        platform.prefetch(self._descriptor(), offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            CheckpointFormatError: the range is not inside the file, or reading fails.
        """
        return bytes(self._copy(offset, length))

    def map(self, offset: int, length: int) -> FileMapping:
        """Returns a range of the file in memory, faulted in, so that using it cannot fail.

        Raises:
            ChangedWhileReadingError: the file was truncated.
            CheckpointFormatError: the range is not inside the file, or reading fails.
        """
        self._check_range(offset, length)
        if self._can_map and length >= _SMALL and (mapped := self._map(offset, length)) is not None:
            return mapped
        return FileMapping(self._copy(offset, length), 0, offset)

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if the size or the modification time of the file has changed."""
        status = _status(self._descriptor(), self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise ChangedWhileReadingError(
                f"{self.path}: changed while reading: expected {self.size:,} bytes, unmodified, got "
                f"{status.st_size:,} bytes, modified. Wait until nothing writes to it, then run again."
            )

    def close(self) -> None:
        """Closes the file. Mappings stay valid as long as they are referenced."""
        if self._fd >= 0:
            descriptor, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # nothing was written, and the descriptor is gone either way
                os.close(descriptor)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"InputFile({quote(self.path)}, {size(self.size)})"

    def _descriptor(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        return self._fd

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            got = f"got a file of {self.size:,} bytes"
            fail(self.path, f"expected {length:,} bytes at byte {offset:,}, {got}", _TRUNCATED)

    def _copy(self, offset: int, length: int) -> bytearray:
        self._check_range(offset, length)
        copy = bytearray(length)
        target, done = memoryview(copy), 0
        while done < length:
            try:
                count = platform.read_into(self._descriptor(), target[done:], offset + done)
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
        return copy

    def _map(self, offset: int, length: int) -> FileMapping | None:
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        if not self._is_known_local:
            self._is_known_local = True
            if platform.is_remote(self._descriptor()):
                self._can_map = False
                return None
        try:
            mapped = platform.map_range(self._descriptor(), begin, offset + length - begin)
        except ValueError:
            self.check_unchanged()  # Python found that the mapping would go past the end of the file
            raise
        except OSError as error:
            if self._must_map:
                raise ResourceError(
                    f"{self.path}: --io mmap: the system refused the mapping: {error.strerror}. Use --io auto."
                ) from error
            self._can_map = False  # some network and FUSE file systems refuse mappings: pread serves them
            return None
        if code := platform.populate(mapped):
            self.check_unchanged()
            fail(self.path, f"reading at byte {offset:,} failed: {os.strerror(code)}", "Check the disk")
        return FileMapping(mapped, offset - begin, offset)


class FileRange:
    """The bytes [begin, begin + size) of a file, read like a file: one archive among others.

    Raises:
        CheckpointFormatError: they are not all inside the file.
    """

    def __init__(self, file: InputFile, begin: int, size: int) -> None:
        if begin < 0 or size < 0 or begin + size > file.size:
            got = f"got a file of {file.size:,} bytes"
            fail(file.path, f"expected {size:,} bytes at byte {begin:,}, {got}", _TRUNCATED)
        self._file, self.begin, self.size, self.path = file, begin, size, file.path

    def read(self, offset: int, length: int) -> bytes:
        """As `InputFile.read`, from the first byte of the range."""
        if offset < 0 or length < 0 or offset + length > self.size:
            fail(self.path, f"expected {length:,} bytes at byte {self.begin + offset:,}", _TRUNCATED)
        return self._file.read(self.begin + offset, length)


# What a reader of headers takes: path, size and `read`.
Readable = InputFile | FileRange


def _open(path: Path) -> tuple[int, os.stat_result]:
    limit = platform.raise_open_file_limit()
    try:
        fd = os.open(path, platform.READ_FLAGS)
    except OSError as error:
        if error.errno == errno.EMFILE and limit is not None:
            raise TooManyFilesError(str(path), limit + 1, limit) from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ResourceError(f"{path}: cannot be opened: {error.strerror}. Close other programs.") from error
        advice = "Check the path" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "Check its permissions and kind"
        raise CheckpointFormatError(f"{path}: cannot be opened: {error.strerror}. {advice}.") from error
    try:
        if limit is not None and fd >= limit - min(_RESERVE, limit // 4):  # the system hands out the lowest free number
            raise TooManyFilesError(str(path), limit + 1, limit)
        status = _status(fd, path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            fail(path, f"expected a checkpoint file, got {kind}", "Name a file, or a folder of checkpoints")
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def _status(fd: int, path: Path) -> os.stat_result:
    try:
        return os.fstat(fd)
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be checked: {error.strerror}. Check its disk.") from error
