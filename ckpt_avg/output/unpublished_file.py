"""`atomic_output`: the final path is absent, what it was, or complete; never anything between.

The data goes to a file without a name (``O_TMPFILE``), or where the file system has none to a hidden name beside
the output. Space is reserved first. `publish` syncs the data, gives the file its name in one system call, and
syncs the folder, since POSIX lets a crash forget a name whose folder was not synced. A file whose fsync failed is
discarded: the kernel has already marked its pages clean, so a second fsync would succeed without writing them
(Rebello et al., USENIX ATC 2020).

An output path that is a symbolic link is followed: the file it points to is replaced, the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ckpt_avg.errors import OutputError
from ckpt_avg.files.platform import start_writing
from ckpt_avg.text import size as readable_size

# Bytes given to the system at a time. More at once lets the page cache take blocks so large that they may have to be
# made, or fetched from a virtual machine's host, first: measured up to 20 times slower.
_PIECE = 256 * 1024


class UnpublishedFile:
    """The output while it is being filled. Threads may write to it side by side."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._fd = -1
        # Set before the name exists, so that `close` removes it whenever a signal comes.
        self._hidden: Path | None = None

    def new_name(self) -> str:
        """Returns a name for a hidden file beside the output."""
        return _hidden_name(self.target).name

    def take_name(self, name: str) -> None:
        """Says under which hidden name the file will be, or is, so that `close` removes it."""
        self._hidden = self.target.with_name(name)

    def open(self, size: int) -> None:
        """Creates the file and reserves its bytes.

        Raises:
            OutputError: the folder cannot be written, or has no room.
        """
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        try:
            if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd") and self._hidden is None:
                try:
                    self._fd = os.open(self.target.parent, flags | os.O_TMPFILE, 0o666)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                        raise
            if self._fd < 0:
                self._hidden = self._hidden or _hidden_name(self.target)
                self._fd = os.open(self._hidden, flags | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise _output_error(self.target, "its folder cannot be written", error) from error
        _reserve(self.target, self._fd, size)

    def join(self) -> None:
        """Opens the file that another process has created under its hidden name.

        Raises:
            OutputError: there is none here.
        """
        try:
            self._fd = os.open(self.readable_path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise OutputError(
                f"{self.target}: the file that rank 0 created beside it cannot be opened here: {error.strerror}. Write "
                "to storage that all ranks share."
            ) from error

    @property
    def readable_path(self) -> Path:
        """A path under which this process can read the file before it has its name."""
        return self._hidden or Path(f"/proc/self/fd/{self._fd}")

    def write(self, contents: memoryview | bytes, offset: int) -> None:
        """Writes all of ``contents`` at ``offset``.

        Raises:
            OutputError: the system refused.
        """
        rest = memoryview(contents).cast("B")
        begin, length = offset, len(rest)
        while len(rest):
            try:
                count = self._write_some(rest[:_PIECE], offset)
            except OSError as error:
                raise _output_error(self.target, "writing failed", error) from error
            rest, offset = rest[count:], offset + count
        start_writing(self._fd, begin, length)

    def read(self, length: int, offset: int) -> bytes:
        """Returns what stands there, of no more than these bytes, as far as this process can see it.

        Raises:
            OutputError: the system refused.
        """
        try:
            if hasattr(os, "pread"):
                return os.pread(self._fd, length, offset)
            os.lseek(self._fd, offset, os.SEEK_SET)  # Windows, where one thread reads
            return os.read(self._fd, length)
        except OSError as error:
            raise _output_error(self.target, "reading failed", error) from error

    def read_exactly(self, offset: int, length: int) -> bytes:
        """Returns these bytes of the file.

        Raises:
            OutputError: the system refused, or the file is shorter.
        """
        found = bytearray()
        while len(found) < length:
            piece = self.read(length - len(found), offset + len(found))
            if not piece:
                raise OutputError(
                    f"{self.target}: expected {length:,} bytes at byte {offset:,} of what was written, got "
                    f"{len(found):,}. Something else changed it; run again."
                )
            found += piece
        return bytes(found)

    def forget(self) -> None:
        """Lets go of what the system holds of the file in memory: other machines have written to it meanwhile."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a hint
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write_some(self, contents: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, contents, offset)
        os.lseek(self._fd, offset, os.SEEK_SET)  # Windows, where the writer uses one thread
        return os.write(self._fd, contents)

    def sync(self) -> None:
        """Makes what this process has written durable.

        Raises:
            OutputError: the system could not.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _output_error(self.target, "fsync failed, so the data is discarded", error) from error

    def publish(self, *, overwrite: bool) -> bool:
        """Makes the file durable and gives it its name.

        Returns:
            Whether the name is durable, too: some file systems have no fsync for folders.

        Raises:
            OutputError: syncing failed, or the path has come to exist meanwhile and ``overwrite`` is off. Nothing
                is published then.
        """
        self.sync()
        if self._hidden is not None:
            self._close_descriptor()  # Windows renames no open file
        try:
            if overwrite:
                self._replace()
            else:
                self._create()
        except FileExistsError as error:
            raise OutputError(
                f"{self.target}: came to exist during the run and is kept. Choose another path, or use --overwrite."
            ) from error
        except OSError as error:
            raise _output_error(self.target, "publishing failed", error) from error
        return _sync_folder(self.target)

    def _create(self) -> None:
        if self._hidden is None:
            self._link(self.target)
            return
        try:
            os.link(self._hidden, self.target)
        except FileExistsError:
            raise
        except (OSError, AttributeError):
            # No hard links here (FAT, some network file systems): a look, then a rename, which is not one step.
            if os.path.lexists(self.target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target)) from None
            os.rename(self._hidden, self.target)
            self._hidden = None

    def _replace(self) -> None:
        if self._hidden is None:
            # A link cannot replace a name, so the file gets a hidden one first.
            self._hidden = _hidden_name(self.target)
            self._link(self._hidden)
        os.replace(self._hidden, self.target)
        self._hidden = None

    def _link(self, name: Path) -> None:
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(str(self._fd), name, src_dir_fd=folder, follow_symlinks=True)
        finally:
            _close(folder)

    def _close_descriptor(self) -> None:
        if self._fd >= 0:
            descriptor, self._fd = self._fd, -1
            _close(descriptor)

    def close(self) -> None:
        """Closes the file and removes its hidden name; unpublished, it is gone."""
        self._close_descriptor()
        if self._hidden is not None:
            with contextlib.suppress(OSError):  # gone, or out of reach: why is no news beside what led here
                os.unlink(self._hidden)
            self._hidden = None


@contextlib.contextmanager
def atomic_output(target: Path, size: int) -> Iterator[UnpublishedFile]:
    """Yields an unpublished file of ``size`` reserved bytes; without `publish` it vanishes.

    Raises:
        OutputError: the folder cannot be written, or has no room.
    """
    file = UnpublishedFile(target)
    try:
        file.open(size)
        yield file
    finally:
        file.close()


def _close(descriptor: int) -> None:
    # What counts was said by fsync; an error here tells nothing more, and the descriptor is gone either way.
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _hidden_name(target: Path) -> Path:
    # Cut, so that a name at the system's limit still leaves room for the suffix.
    return target.with_name(f".{target.name.encode()[:200].decode(errors='ignore')}.{secrets.token_hex(6)}.tmp")


def _reserve(target: Path, descriptor: int, size: int) -> None:
    try:
        if hasattr(os, "posix_fallocate") and size:
            try:
                os.posix_fallocate(descriptor, 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            status = os.statvfs(target.parent)
            raise OutputError(
                f"{target}: no room for it: expected {readable_size(size)} free, got "
                f"{readable_size(status.f_bavail * status.f_frsize)}. Free some space or write elsewhere."
            ) from error
        raise _output_error(target, f"reserving {readable_size(size)} failed", error) from error


def _sync_folder(target: Path) -> bool:
    if not hasattr(os, "O_DIRECTORY"):
        return False  # Windows cannot sync a folder
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            _close(folder)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise _output_error(target, "written, but syncing its folder failed, so a crash may lose it", error) from error
    return True


def _output_error(target: Path, what: str, error: OSError) -> OutputError:
    return OutputError(f"{target}: {what}: {error.strerror}. Check the disk and the permissions, then run again.")
