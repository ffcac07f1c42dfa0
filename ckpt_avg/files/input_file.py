"""`InputFile`: one input file, opened once and read at checked offsets.

It promises:
- Opening never blocks on a FIFO or a device, and only regular files are read.
- No read goes past the end that the file had when it was opened.
- A file that shrinks gives `ChangedWhileReadingError`, never a shorter result.

Only the native engine maps files, where that is chosen, and it catches the SIGBUS of a file that has shrunk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ckpt_avg.choices import IO
from ckpt_avg.errors import (
    ChangedWhileReadingError,
    CheckpointFormatError,
    ResourceError,
    TooManyFilesError,
    fail,
)
from ckpt_avg.files import platform
from ckpt_avg.text import quote, size

_RESERVE = 64  # descriptors that inputs leave to the output, mappings and the rest of the process
_TRUNCATED = "It is truncated or damaged: copy it again"


class InputFile:
    """A regular file, opened for reading. Threads may share it.

    Attributes:
        path: the file.
        size: its bytes when it was opened.
        identity: its device and inode.
        modified: when it was last written to, in nanoseconds.
        is_mapped: whether the native engine is to map it.

    Args:
        path: the file.
        reserve: how many descriptors must stay free.

    Raises:
        CheckpointFormatError: it cannot be opened, or is not a regular file.
        ResourceError: too many files are open.
    """

    def __init__(self, path: Path, *, reserve: int = _RESERVE) -> None:
        self.path = path
        self._fd, status = _open(path, reserve)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        self.modified = status.st_mtime_ns
        self.use_io("auto")

    def use_io(self, io: IO) -> None:
        """Chooses how the native engine gets the bytes: ``mmap`` where the system can, or ``pread``; ``auto`` (the
        default) is ``pread``.
        """
        self.is_mapped = io == "mmap" and platform.CAN_MAP

    def mapping_refused(self, code: int) -> ResourceError:
        """Returns the error for a mapping that the system refused with an errno: some network file systems do."""
        return ResourceError(
            f"{self.path}: --io mmap: the system refused the mapping: {os.strerror(code)}. Use --io auto."
        )

    def load(self, offset: int, length: int) -> None:
        """Lets the system bring a range into the page cache. A hint."""
        with contextlib.suppress(ValueError):  # closed meanwhile
            platform.load(self.descriptor(), offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            CheckpointFormatError: the range is not inside the file, or reading fails.
        """
        self._check_range(offset, length)
        try:
            contents = platform.read(self.descriptor(), length, offset)
        except OSError as error:
            raise self.failure(offset, error.errno) from error
        if len(contents) < length:  # the system reads less than everything if it likes
            rest = bytearray(length - len(contents))
            self.read_into(memoryview(rest), offset + len(contents))
            contents += rest
        return contents

    def read_each(self, offsets: Sequence[int], length: int) -> list[bytes]:
        """Returns ``length`` bytes from each offset, faster than many calls of `read`, and raises what it raises."""
        if min(offsets, default=0) >= 0 and max(offsets, default=0) + length <= self.size:
            descriptor = self.descriptor()
            with contextlib.suppress(OSError):
                found = [platform.read(descriptor, length, offset) for offset in offsets]
                if set(map(len, found)) <= {length}:
                    return found
        return [self.read(offset, length) for offset in offsets]  # slower; tells what fails

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills ``target``, of bytes, from ``offset``. Raises what `read` raises."""
        self._check_range(offset, len(target))
        done = 0
        while done < len(target):
            try:
                count = platform.read_into(self.descriptor(), [target[done:]], offset + done)
            except OSError as error:
                raise self.failure(offset + done, error.errno) from error
            if count == 0:
                raise self.failure(offset + done)
            done += count

    def read_into_each(self, targets: Sequence[memoryview], offset: int) -> None:
        """Fills each of ``targets``, of bytes, in turn from ``offset``. Raises what `read` raises."""
        self._check_range(offset, sum(map(len, targets)))
        try:
            done = platform.read_into(self.descriptor(), targets, offset)
        except OSError as error:
            raise self.failure(offset, error.errno) from error
        for target in targets:
            if done < len(target):  # the system reads less than everything if it likes
                self.read_into(target[done:], offset + done)
            offset, done = offset + len(target), max(0, done - len(target))

    def failure(self, offset: int, code: int | None = None) -> CheckpointFormatError:
        """Returns the error for a read at ``offset`` that failed with an errno, or ended early."""
        try:
            if code is None:
                self.check_unchanged()
        except ChangedWhileReadingError as error:
            return error
        reason = os.strerror(errno.EIO if code is None else code)
        return CheckpointFormatError(f"{self.path}: reading at byte {offset:,} failed: {reason}. Check the disk.")

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if the size or the modification time of the file has changed."""
        status = _status(self.descriptor(), self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified):
            raise ChangedWhileReadingError(
                f"{self.path}: changed while reading: expected {self.size:,} bytes, unmodified, got "
                f"{status.st_size:,} bytes, modified. Wait until nothing writes to it, then run again."
            )

    def close(self) -> None:
        """Closes the file."""
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

    def descriptor(self) -> int:
        """Returns the number by which the system knows the open file."""
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        return self._fd

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            got = f"got a file of {self.size:,} bytes"
            fail(self.path, f"expected {length:,} bytes at byte {offset:,}, {got}", _TRUNCATED)


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


def _open(path: Path, reserve: int) -> tuple[int, os.stat_result]:
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
        if limit is not None and fd >= limit - min(reserve, limit // 4):  # the system hands out the lowest free number
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
