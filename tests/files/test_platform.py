"""Calls that only Linux has: reading ahead, and writing early."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import time
from pathlib import Path

import pytest

from ckpt_avg.files import platform
from ckpt_avg.files.platform import load, start_writing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")


def test_other_systems_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have none of these calls."""
    monkeypatch.setattr(platform, "_LIBC", None)
    start_writing(0, 0, 10)


KiB = 1024


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs preadv2")
@pytest.mark.parametrize("answer", [None, errno.EAGAIN, errno.EOPNOTSUPP], ids=["there", "elsewhere", "unknown"])
@pytest.mark.parametrize("fails", [False, True])
def test_only_what_is_not_in_memory_is_loaded(monkeypatch: pytest.MonkeyPatch, answer: int | None, fails: bool) -> None:
    """A hint for what is there costs time, and one that fails ends no run."""
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
    monkeypatch.setenv("CKPT_AVG_ENGINE", "torch")  # the kernel makes the call itself
    load(0, 5, 300 * KiB)
    load(0, 5, 0)
    assert advised == ([] if answer is None else [(5, 300 * KiB)])


def test_the_kernel_refuses_no_file_and_only_impossible_ranges() -> None:
    """A hint ends no run, but arithmetic that overflows is undefined in C."""
    kernel = pytest.importorskip("ckpt_avg._kernel")
    kernel.advise(-1, 5, 300 * KiB)
    kernel.advise(-1, 0, sys.maxsize - 128 * KiB)
    for offset, length in ((-1, 5), (0, -1), (sys.maxsize, 1), (1, sys.maxsize - 1)):
        with pytest.raises(ValueError, match="no such range"):
            kernel.advise(-1, offset, length)


def test_what_is_loaded_is_in_memory_soon(tmp_path: Path) -> None:
    """All of it, though Linux may load no more than 128 KiB for one call. Some file systems keep all in memory."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096 * KiB))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages = range((512 * KiB + 5) // mmap.PAGESIZE, (2560 * KiB + 4) // mmap.PAGESIZE + 1)
        if any(in_memory(mapped)[page] for page in pages):
            pytest.skip("this file system keeps everything in memory")
        load(file.fileno(), 512 * KiB + 5, 2048 * KiB)
        deadline = time.monotonic() + 20
        while not all(in_memory(mapped)[page] for page in pages):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def in_memory(mapped: mmap.mmap) -> list[bool]:
    """Which pages of a mapped file are in memory. A read that does not wait may load the page that it asks for."""
    pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
    return [bool(page & 1) for page in pages]


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
