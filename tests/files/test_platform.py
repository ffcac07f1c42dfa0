"""Calls that only Linux has: which storage is remote, reading ahead, and writing early."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from pathlib import Path

import pytest

from ckpt_avg.files import platform
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.platform import is_remote, load, start_writing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")


def test_local_files_are_not_remote(tmp_path: Path) -> None:
    """A local disk must not lose its mappings; a descriptor that cannot be asked counts as local."""
    for path in (tmp_path, Path("/dev/shm"), Path("/proc")):
        if path.exists():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                assert not is_remote(descriptor), path
            finally:
                os.close(descriptor)
    assert not is_remote(-1)


@pytest.mark.parametrize(
    ("number", "remote"),
    [(0x6969, True), (0x65735546, True), (0xFF534D42, True), (0x0BD00BD0, True), (0xEF53, False)],
    ids=["NFS", "FUSE", "CIFS", "Lustre", "ext4"],
)
def test_network_file_systems_are_read_and_not_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, remote: bool
) -> None:
    """CIFS' number has its highest bit set, and a long of 64 bits must not turn it negative."""

    def fstatfs(descriptor: int, status: object) -> int:
        ctypes.cast(status, ctypes.POINTER(ctypes.c_long))[0] = number  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr(platform._LIBC, "fstatfs", fstatfs)
    assert is_remote(0) == remote
    path = tmp_path / "file"
    path.touch()
    with InputFile(path) as file:
        assert file.can_map() != remote
        file.use_io("mmap")
        assert file.can_map()


def test_other_systems_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have none of these calls."""
    monkeypatch.setattr(platform, "_LIBC", None)
    assert not is_remote(0)
    start_writing(0, 0, 10)


def test_the_first_field_is_where_it_is_looked_for(tmp_path: Path) -> None:
    """What ``stat -f`` says of a file system is what is read here."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs")
    descriptor = os.open("/dev/shm", os.O_RDONLY)
    status = (ctypes.c_long * 64)()
    platform._LIBC.fstatfs(descriptor, ctypes.byref(status))
    os.close(descriptor)
    assert status[0] & 0xFFFFFFFF == 0x01021994  # TMPFS_MAGIC


KiB = 1024


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs preadv2")
@pytest.mark.parametrize("answer", [None, errno.EAGAIN, errno.EOPNOTSUPP], ids=["there", "elsewhere", "unknown"])
@pytest.mark.parametrize("fails", [False, True])
def test_only_what_is_not_in_memory_is_loaded(monkeypatch: pytest.MonkeyPatch, answer: int | None, fails: bool) -> None:
    """A hint for what is there costs time, one for more than 128 KiB may be cut, and one that fails ends no run."""
    advised: list[tuple[int, int]] = []

    def read(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        assert (len(buffers[0]), offset, flags) == (1, 5 + 300 * KiB - 1, os.RWF_NOWAIT)
        if answer is not None:
            raise OSError(answer, "no")
        return 1

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        advised.append((offset, length))
        if fails:
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    load(0, 5, 300 * KiB)
    load(0, 5, 0)
    everything = [(5, 128 * KiB), (5 + 128 * KiB, 128 * KiB), (5 + 256 * KiB, 44 * KiB)]
    assert advised == ([] if answer is None else everything[:1] if fails else everything)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs preadv2")
def test_what_is_loaded_is_in_memory_soon(tmp_path: Path) -> None:
    """The whole range, where the system says what is there: some file systems don't, or keep everything in memory."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * 1024 * KiB))
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if is_there(descriptor, 2048 * KiB) is not False:
            pytest.skip("this file system does not say what is in memory")
        load(descriptor, 512 * KiB, 2048 * KiB)
        deadline = time.monotonic() + 20
        while not all(is_there(descriptor, each * KiB) for each in range(512, 2560, 4)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.close(descriptor)


def is_there(descriptor: int, offset: int) -> bool | None:
    """Whether a byte of a file is in memory; None if the file system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


def test_writing_can_be_begun_anywhere(tmp_path: Path) -> None:
    """Whatever the file system answers, what was written stands there."""
    for folder in (tmp_path, Path("/dev/shm")):
        if folder.is_dir():
            path = folder / f"ckpt-avg-{os.getpid()}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, b"x" * 10_000, 3)
                start_writing(descriptor, 3, 10_000)
                start_writing(descriptor, 0, 0)
                assert path.read_bytes() == b"\0\0\0" + b"x" * 10_000
            finally:
                os.close(descriptor)
                path.unlink()
