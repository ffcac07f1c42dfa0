"""What is asked of the storage beyond reading and writing: what kind it is, and to begin before it must."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

# The numbers of file systems that fetch pages over a network, or ask another process for each of them: linux/magic.h,
# and the sources of those that live outside of the kernel. A page fault there is a round trip.
_REMOTE = {
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x517B: "SMB",
    0x65735546: "FUSE",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x6B414653: "kAFS",
    0x73757245: "Coda",
    0x564C: "NCP",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x20030528: "PVFS2",
    0x786F4256: "VirtualBox shared folders",
    0xBACBACBC: "VMware shared folders",
    0xAAD7AAEA: "PanFS",
}

_SYNC_FILE_RANGE_WRITE = 2


def prefetch(descriptor: int, offset: int, length: int) -> None:
    """Asks the system to bring a range into memory meanwhile, unless it is there. Only a hint: it never fails."""
    if not length or not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        if hasattr(os, "RWF_NOWAIT"):
            with contextlib.suppress(OSError):  # EAGAIN: not in memory, or a file system that cannot tell
                os.preadv(descriptor, [bytearray(1)], offset + length - 1, os.RWF_NOWAIT)
                return
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


if sys.platform == "linux":
    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
    _LIBC.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def start_writing(descriptor: int, offset: int, length: int) -> None:
        """Asks the system to begin bringing a range to the disk, so that the fsync in the end finds little left.

        What that meets is for fsync to tell: nothing is returned.
        """
        _LIBC.sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)

    def remote_kind(descriptor: int) -> str | None:
        """Returns the name of the network or user-space file system that an open file lies on; None if it is local."""
        status = (ctypes.c_long * 64)()  # the first field of struct statfs is the type, as wide as a long
        if _LIBC.fstatfs(descriptor, ctypes.byref(status)) != 0:
            return None
        return _REMOTE.get(status[0] & 0xFFFFFFFF)

else:

    def start_writing(descriptor: int, offset: int, length: int) -> None:
        """Does nothing: here the system has no such call."""

    def remote_kind(descriptor: int) -> str | None:
        """Returns None: here the system is not asked."""
        return None
