"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_avg.machine.control_groups import groups_with

_UNKNOWN = 2 * 2**30
# Of control groups' two versions: the limit, what is in use, and what of that can be given up at once.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory() -> int:
    """Returns the bytes that the system, and the control groups that this process is in, still have to give.

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
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """Returns what each group that this process is in leaves, where there is a limit."""
    left = [_left_in(folder, *_FILES[version]) for version, folder in groups_with("memory")]
    return [free for free in left if free is not None]


def _left_in(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    try:
        allowed, taken = ((folder / name).read_text().strip() for name in (limit, used))
        statistics = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # no limit here, or another group's folder that a container does not show
    if allowed == "max":
        return None
    return max(0, int(allowed) - int(taken) + int(statistics.get(reclaimable, "0")))
