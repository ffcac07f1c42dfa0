"""Room for as many open files as there are checkpoints: each takes one, and its window in each worker another."""

from __future__ import annotations

import sys

from ckpt_avg.errors import ResourceError

_OTHERS = 64  # descriptors that the rest of the process may need


def allow_open_files(count: int) -> None:
    """Raises this process's soft limit on open files where ``count`` more would exceed it.

    Raises:
        ResourceError: the hard limit is lower.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHERS
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ResourceError(
            f"expected room for {needed:,} open files, got a limit of {hard:,}. Raise it (ulimit -Hn) or average fewer "
            "checkpoints at a time."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def allow_more_open_files() -> bool:
    """Doubles this process's soft limit on open files, as far as the hard limit lets it; returns whether it grew."""
    if sys.platform == "win32":
        return False
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
    if soft == resource.RLIM_INFINITY or more <= soft:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    return True
