"""Which of the discovered checkpoints to average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.messages import listing, plural


@dataclass(frozen=True, slots=True)
class Selection:
    """What to take. The rules apply in this order.

    Attributes:
        include: glob patterns for file names; a checkpoint that matches none is left out.
        exclude: glob patterns for file names; a checkpoint that matches one is left out.
        every: of what is left, each K-th, counted back from the last, which is always taken.
        last: of what is left, the last N.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    every: int | None = None
    last: int | None = None


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """Returns glob patterns as a tuple; a single one may be given as it is."""
    return (given,) if isinstance(given, str) else tuple(given)


def select(paths: Sequence[Path], selection: Selection) -> tuple[Path, ...]:
    """Applies a selection to checkpoints in order.

    Raises:
        UsageError: ``last`` or ``every`` is below 1.
        IncompatibleError: nothing is left, or fewer than ``last`` asks for.
    """
    for option, number in (("--last", selection.last), ("--every", selection.every)):
        if number is not None and number < 1:
            raise UsageError(f"{option}: expected 1 or more, got {number}.")
    kept = [
        path
        for path in paths
        if (not selection.include or any(fnmatchcase(path.name, pattern) for pattern in selection.include))
        and not any(fnmatchcase(path.name, pattern) for pattern in selection.exclude)
    ]
    if not kept:
        found = listing(path.name for path in paths)
        raise IncompatibleError(
            f"nothing to average: --include and --exclude leave none of {plural(len(paths), 'checkpoint')} ({found}). "
            "The patterns are matched with file names; change them."
        )
    if selection.every is not None:
        kept = kept[::-1][:: selection.every][::-1]
    if selection.last is not None:
        if len(kept) < selection.last:
            raise IncompatibleError(
                f"--last {selection.last}: expected at least that many checkpoints, got {len(kept)} "
                f"({listing(path.name for path in kept)}). Ask for --last {len(kept)} or name more."
            )
        kept = kept[-selection.last :]
    return tuple(kept)
