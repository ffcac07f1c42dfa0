"""A mapped file that is cut while its window is being read: an error instead of a killed process.

Reading a page behind the end of a file that has shrunk raises SIGBUS, whose default action is to kill. The handler here
maps zeros where a window of ours has lost its pages, so that the computation goes on; the look at every input that ends
it says that the file was changed, and nothing is published. A fault anywhere else kills as it would without.

A handler of Python's signal module would run much too late, hence ctypes: the faulting thread itself runs it, at a read
of memory during which it holds no lock that the handler needs.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import signal
import sys
import weakref

_WINDOWS: dict[int, tuple[int, int]] = {}  # token → (first address, address behind the last)
_TOKENS = itertools.count()

_RESTART, _WITH_ADDRESS = 0x10000000, 4  # SA_RESTART, SA_SIGINFO


def watch(window: mmap.mmap, address: int) -> None:
    """Says that a window lies at an address, for as long as it lives."""
    token = next(_TOKENS)
    _WINDOWS[token] = (address, address + len(window))
    weakref.finalize(window, _WINDOWS.pop, token, None).atexit = False


if sys.platform == "linux" and sys.maxsize > 2**32:

    class _Info(ctypes.Structure):
        """``siginfo_t`` of Linux on 64 bits, as far as the address of the fault."""

        _fields_ = (("numbers", ctypes.c_int * 4), ("address", ctypes.c_void_p), ("rest", ctypes.c_char * 104))

    _Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_Info), ctypes.c_void_p)

    class _Action(ctypes.Structure):
        """``struct sigaction`` of glibc and musl."""

        _fields_ = (
            ("handler", _Handler),
            ("mask", ctypes.c_ulong * 16),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )

    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.mmap.restype = ctypes.c_void_p
    _LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _FIXED = 0x10  # MAP_FIXED

    def _on_fault(number: int, info: ctypes._Pointer[_Info], context: int) -> None:
        address = info.contents.address or 0
        for begin, end in reversed(list(_WINDOWS.values())):  # the newest first: an older one may just be going
            if begin <= address < end:
                # The file ends before this page, so nothing behind it is there either.
                page = address - address % mmap.PAGESIZE
                length = end - page
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
                if _LIBC.mmap(page, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == page:
                    return
        # Back to the default: the same read faults again, and kills.
        _LIBC.sigaction(signal.SIGBUS, ctypes.byref(_Action()), None)

    _HANDLER = _Handler(_on_fault)  # must live as long as the process

    def catch_bus_errors() -> None:
        """Installs the handler. For a process of our own only: it takes the place of any other."""
        action = _Action(handler=_HANDLER, flags=_WITH_ADDRESS | _RESTART)
        _LIBC.sigaction(signal.SIGBUS, ctypes.byref(action), None)

else:

    def catch_bus_errors() -> None:
        """There are no maps here that could be cut: bytes are read with ``pread``."""
