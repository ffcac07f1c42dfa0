"""Everything that only some systems have, and what replaces it elsewhere: plain reads, and hints that do nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckpt_avg.engine import kernel

if sys.platform != "win32":
    import fcntl  # not later, when no file may be left to open it

# Opening a FIFO or a device must not block.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
WRITE_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

_POSITION = threading.Lock()  # Windows: a descriptor has one position, which all threads share
_SYNC_FILE_RANGE_WRITE = 2
_CURRENT, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD, and the flag of renameat2: linux/fcntl.h, linux/fs.h
_MOST_TARGETS = 1024  # of one call: IOV_MAX of Linux and macOS
CAN_MAP = sys.platform == "linux"  # files, for the native engine

_LIBC: Any = None  # on Linux: calls that Python lacks, or makes with the interpreter lock held
if sys.platform == "linux":
    _LIBC = ctypes.CDLL(None, use_errno=True)
    if hasattr(_LIBC, "renameat2"):  # glibc 2.28
        _LIBC.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    _LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def load(descriptor: int, offset: int, length: int) -> None:
    """Lets the system bring a range into the page cache, unless its end is there. A hint: it never fails.

    Reading here would wait for the storage, and copy the bytes.
    """
    if not length or not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):  # it is not there, or the file system cannot tell
        if hasattr(os, "RWF_NOWAIT"):
            os.preadv(descriptor, [bytearray(1)], offset + length - 1, os.RWF_NOWAIT)
            return
    if (built := kernel()) is not None:
        built.advise(descriptor, offset, length)
        return
    with contextlib.suppress(OSError):  # Linux may load less than all of it
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def memory(nbytes: int, *, is_filled: bool = False) -> mmap.mmap:
    """Returns memory of zeros, which takes none until it is used. A forked process does not see later changes.

    Of memory that will be filled, Linux is asked for huge pages: each page takes a fault when it is used first.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if is_filled and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel was built without them
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def open_unnamed(folder: Path) -> int | None:
    """Creates a file without a name; returns its descriptor, or None where that or naming it later is impossible."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, WRITE_FLAGS | os.O_TMPFILE, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):  # older kernels, NFS, FUSE
            return None
        raise


def link_unnamed(descriptor: int, name: Path) -> None:
    """Gives a file of `open_unnamed` its name. Raises FileExistsError if the name is taken."""
    with _opened_folder("/proc/self/fd") as folder:
        os.link(str(descriptor), name, src_dir_fd=folder, follow_symlinks=True)


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks a file until it is closed; returns False if another process has locked it, or there are no locks here."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def free_space(folder: Path) -> int:
    """Returns the bytes that this process could write to a folder's file system; a large number if it cannot tell."""
    if not hasattr(os, "statvfs"):
        import shutil

        return shutil.disk_usage(folder).free
    try:
        status = os.statvfs(folder)
    except OSError:
        return sys.maxsize
    free = status.f_bfree if os.geteuid() == 0 else status.f_bavail  # some blocks are for root alone
    return free * status.f_frsize if status.f_blocks else sys.maxsize  # no blocks: without a limit, as tmpfs can be


def reserve(descriptor: int, size: int) -> None:
    """Makes an empty file ``size`` bytes long, with space reserved on the disk where the file system can do that."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)


def sync_folder(folder: Path) -> bool:
    """Makes the names in a folder durable. Returns False if the system or the file system has no fsync for folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return False
    try:
        with _opened_folder(folder) as descriptor:
            os.fsync(descriptor)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted at a path, as far as the system tells; also a part of the same file system."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # The fifth field, in which spaces and the like are octal: proc(5).
    return any(_unescaped(line.split(b" ")[4]) == os.fsencode(path) for line in lines)


def _unescaped(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def open_folder(path: Path | str) -> int:
    """Opens a folder; returns its descriptor. Raises OSError, on Windows always."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two files or folders in one step; returns False where the system cannot do that."""
    if _LIBC is None or not hasattr(_LIBC, "renameat2"):
        return False
    if _LIBC.renameat2(_CURRENT, os.fsencode(first), _CURRENT, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # older kernels, NFS, FUSE
        return False
    raise OSError(code, os.strerror(code), str(second))


@contextlib.contextmanager
def _opened_folder(path: Path | str) -> Iterator[int]:
    descriptor = open_folder(path)
    try:
        yield descriptor
    finally:
        close(descriptor)


def close(descriptor: int) -> None:
    """Closes a descriptor. Errors are ignored: it is closed either way, and fsync has reported what matters."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def drop_cache(descriptor: int) -> None:
    """Asks the system to forget the cached contents of a file. A hint: it never fails."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_at(descriptor: int, contents: memoryview, offset: int) -> int:
    """Writes some bytes at an offset and returns how many."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, contents, offset)
    with _POSITION:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, contents)


def read(descriptor: int, length: int, offset: int) -> bytes:
    """Returns some of ``length`` bytes from an offset."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _POSITION:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


def read_into(descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
    """Reads some bytes from an offset into the targets, one after the other, and returns how many."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, targets[:_MOST_TARGETS], offset)
    chunk = read(descriptor, len(targets[0]), offset)
    targets[0][: len(chunk)] = chunk
    return len(chunk)


def raise_open_file_limit() -> int | None:
    """Raises the soft limit on open files to the hard one; returns the limit, None if there is none."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return None if soft == resource.RLIM_INFINITY else soft


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Asks the system to start writing a range to the disk, so that the final fsync finds little left.

    Errors are ignored: fsync reports them.
    """
    if _LIBC is not None:
        _LIBC.sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)
