"""Which storage is read with ``pread``: told by the kernel's number of its file system."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

from ckpt_avg import storage
from ckpt_avg.mapped import MappedFile
from ckpt_avg.storage import remote_kind

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")


def test_of_local_files(tmp_path: Path) -> None:
    """A local disk must not lose its maps."""
    for path in (tmp_path, Path("/dev/shm"), Path("/proc")):
        if path.exists():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                assert remote_kind(descriptor) is None, path
            finally:
                os.close(descriptor)


def test_a_descriptor_that_cannot_be_asked() -> None:
    assert remote_kind(-1) is None


@pytest.mark.parametrize(
    ("number", "name"),
    [(0x6969, "NFS"), (0x65735546, "FUSE"), (0xFF534D42, "CIFS"), (0x0BD00BD0, "Lustre"), (0xEF53, None)],
)
def test_the_numbers_of_network_file_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, name: str | None
) -> None:
    """CIFS' number has its highest bit set, and a long of 64 bits must not turn it negative."""

    class Kernel:
        @staticmethod
        def fstatfs(descriptor: int, status: object) -> int:
            ctypes.cast(status, ctypes.POINTER(ctypes.c_long))[0] = number  # type: ignore[arg-type]
            return 0

    monkeypatch.setattr(storage, "_LIBC", Kernel)
    assert remote_kind(0) == name
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    with MappedFile(path) as file:
        assert isinstance(file.window(0, 200_000).buffer, bytearray) == (name is not None)
        file.read_by("mmap")
        assert not isinstance(file.window(0, 200_000).buffer, bytearray)


def test_the_first_field_is_where_it_is_looked_for(tmp_path: Path) -> None:
    """What ``stat -f`` says of a file system is what is read here."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs")
    descriptor = os.open("/dev/shm", os.O_RDONLY)
    status = (ctypes.c_long * 64)()
    storage._LIBC.fstatfs(descriptor, ctypes.byref(status))
    os.close(descriptor)
    assert status[0] & 0xFFFFFFFF == 0x01021994  # TMPFS_MAGIC
