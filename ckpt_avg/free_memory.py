"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_UNKNOWN = 2 * 2**30
_GROUPS = Path("/sys/fs/cgroup")
# Of control groups' two versions: the folder, the limit, what is in use, and what of that can be given up at once.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
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
    """Returns what each group that this process is in leaves, from its own up to the root, where there is a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # a kernel without control groups
    left = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version in _FILES:
            root = _GROUPS / version
            own = root / name.lstrip("/")
            left += [
                _left_in(folder, *_FILES[version]) for folder in (own, *own.parents) if folder.is_relative_to(root)
            ]
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
