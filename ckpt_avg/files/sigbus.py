"""An input that is truncated while a mapping of it is read: an error instead of a killed process.

Reading a page after the end of a file that has shrunk raises SIGBUS, which ends a process by default. The handler here
maps zeros where one of our mappings has lost its pages, so that the computation continues. The check of every input at
the end then reports the change, and nothing is published. A fault anywhere else ends the process as usual.

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

_MAPPINGS: dict[int, tuple[int, int]] = {}  # token → (first address, address after the last)
_TOKENS = itertools.count()

_RESTART, _WITH_ADDRESS = 0x10000000, 4  # SA_RESTART, SA_SIGINFO


def watch(mapping: mmap.mmap, address: int) -> None:
    """Tells the handler the address of a mapping, until the mapping is gone."""
    token = next(_TOKENS)
    _MAPPINGS[token] = (address, address + len(mapping))
    weakref.finalize(mapping, _MAPPINGS.pop, token, None).atexit = False


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
        for begin, end in reversed(list(_MAPPINGS.values())):  # the newest first: an older one may just be going
            if begin <= address < end:
                # The file ends before this page, so nothing after it is there either.
                page = address - address % mmap.PAGESIZE
                length = end - page
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
                if _LIBC.mmap(page, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == page:
                    return
        # Back to the default: the same read faults again and ends the process.
        _LIBC.sigaction(signal.SIGBUS, ctypes.byref(_Action()), None)

    _HANDLER = _Handler(_on_fault)  # must live as long as the process

    def catch_bus_errors() -> None:
        """Installs the handler in place of any other: for the command's own process only."""
        action = _Action(handler=_HANDLER, flags=_WITH_ADDRESS | _RESTART)
        _LIBC.sigaction(signal.SIGBUS, ctypes.byref(action), None)

else:

    def catch_bus_errors() -> None:
        """Does nothing: no input is mapped here."""
