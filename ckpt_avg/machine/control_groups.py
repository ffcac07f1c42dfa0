"""The control groups that this process is in, and what they grant it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def groups_with(controller: str) -> Iterator[tuple[int, Path]]:
    """Yields (version, folder) of each group with a controller, from this process's own up to the root.

    Nothing comes where the kernel has no control groups.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT
        own = root / name.lstrip("/")
        version = 1 if controllers else 2
        yield from ((version, folder) for folder in (own, *own.parents) if folder.is_relative_to(root))


def cpu_quota() -> float:
    """Returns how many cores' time this process may use; infinity where there is no limit."""
    return min((_quota_of(version, folder) for version, folder in groups_with("cpu")), default=math.inf)


def _quota_of(version: int, folder: Path) -> float:
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return math.inf  # no limit here, or another group's folder that a container does not show
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
