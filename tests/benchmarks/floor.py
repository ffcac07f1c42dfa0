"""The least that averaging can cost: import torch, fault in every input page by 2 threads, write and fsync an output.

Usage: floor.py OUTPUT INPUT...
"""

import ctypes
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch  # noqa: F401 (its import is part of what is measured)

_MADV_POPULATE_READ = 22
_STEP = 8 * 2**20
_BLOCK = 256 * 1024  # as fast as any size here, and up to 20 times as fast as 8 MiB: see docs/benchmarks.md


def touch(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        for offset in range(0, size, _STEP):
            flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            window = mmap.mmap(file.fileno(), min(_STEP, size - offset), flags=flags, prot=access, offset=offset)
            address = ctypes.addressof(ctypes.c_char.from_buffer(window))
            if libc.madvise(address, len(window), _MADV_POPULATE_READ):
                raise OSError(ctypes.get_errno(), path)


def main() -> None:
    output, *inputs = sys.argv[1:]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(touch, inputs))
    block = memoryview(bytes(_BLOCK))
    left = os.path.getsize(inputs[0])
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
    while left:
        left -= os.write(descriptor, block[: min(_BLOCK, left)])
    os.fsync(descriptor)


main()
