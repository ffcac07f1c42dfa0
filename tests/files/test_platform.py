"""Calls that only Linux has: which storage is remote, reading ahead, and writing early."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

import pytest

from ckpt_avg.files import platform
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.platform import is_remote, prefetch, start_writing

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


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs preadv2")
@pytest.mark.parametrize("answer", ["there", "elsewhere", "unknown"])
@pytest.mark.parametrize("advised", [True, False])
def test_only_what_is_not_in_memory_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, advised: bool
) -> None:
    """Asking for what is there costs a look at each page; a hint that is refused must not end the run."""
    asked: list[tuple[int, int]] = []

    def read(descriptor: int, buffers: object, offset: int, flags: int) -> int:
        assert (offset, flags) == (5 + 1000 - 1, os.RWF_NOWAIT)
        if answer == "there":
            return 1
        raise OSError(errno.EAGAIN if answer == "elsewhere" else errno.EOPNOTSUPP, "no")

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        asked.append((offset, length))
        if not advised:
            raise OSError(errno.ESPIPE, "no")

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    prefetch(0, 5, 1000)
    prefetch(0, 5, 0)
    assert asked == ([] if answer == "there" else [(5, 1000)])


def test_what_was_prefetched_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_000))
    with InputFile(path) as file:
        file.prefetch(1, 2_999_999)
        file.prefetch(0, 0)
        assert file.read(1, 100) == path.read_bytes()[1:101]


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
