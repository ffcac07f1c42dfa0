"""What of a file the kernel holds in memory: looked at, brought in, and dropped."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_COLD = 0.001  # of the pages; the readahead of a header may leave a few behind


def resident(paths: Sequence[Path]) -> float:
    """Returns the fraction of the files' pages that are in memory."""
    present = total = 0
    for path in paths:
        if size := path.stat().st_size:
            pages = _mincore(path, size)
            present += len(pages) - pages.count(0)
            total += len(pages)
    return present / total if total else 1.0


def _mincore(path: Path, size: int) -> bytes:
    """Returns a byte for each page, 0 where it is not in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with path.open("rb") as file:
        # Writable and private only because ctypes takes the address of nothing else; it touches no page.
        mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        if libc.mincore(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), size, pages):
            raise OSError(ctypes.get_errno(), str(path))
    return bytes(byte & 1 for byte in pages.raw)


def warm(paths: Sequence[Path]) -> None:
    """Reads what is not in memory yet."""
    for path in paths:
        if resident([path]) < 1:
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def cool(paths: Sequence[Path]) -> float:
    """Drops the files from memory; returns the fraction that is left.

    Where the advice alone does not do it, and this process may, the kernel drops all clean pages; the interpreter's
    and torch's are then read again, so that they are warm as before.
    """
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident(paths)
    if left > _COLD and os.geteuid() == 0:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        except OSError:
            return left
        subprocess.run([sys.executable, "-c", "import torch, ckpt_avg.cli.main"], check=True)
        left = resident(paths)
    return left
