"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_UNKNOWN = 2 * 2**30


def free_memory() -> int:
    """Returns the bytes that the system, and the control group that this process is in, still have to give.

    Linux tells both; elsewhere half of the machine's memory is taken, or 2 GiB where not even that is known.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
            return _UNKNOWN
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    free = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024 or _UNKNOWN
    return min([free, *_left_in_group()])


def _left_in_group() -> list[int]:
    """Returns what the limit of this process's control group (version 2) leaves, if it has one."""
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []  # another version of control groups, or none
    return [] if limit == "max" else [max(0, int(limit) - int(used))]
