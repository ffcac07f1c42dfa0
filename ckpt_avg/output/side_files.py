"""Files beside the output: a report, a picture. Checked before the work, and published at once like the output."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.formats.sharded import SUFFIX as INDEX_SUFFIX
from ckpt_avg.output.paths import refuse_output_among
from ckpt_avg.output.target import check_target
from ckpt_avg.output.unpublished_file import atomic_output
from ckpt_avg.runs.discover import Sources, discover


class SideFiles:
    """The files that a command was asked to write beside its result.

    Args:
        sources: the checkpoints, none of which may be replaced.
        beside: the output, which none of them may be; None without one.
        overwrite: whether existing files may be replaced.
    """

    def __init__(self, sources: Sources, *, beside: str | os.PathLike[str] | None, overwrite: bool) -> None:
        self._sources = sources
        self._overwrite = overwrite
        self._targets: dict[str, Path] = {}
        self._taken = {} if beside is None else {os.path.realpath(beside): "the output"}

    def leave(self, path: str | os.PathLike[str], whose: str) -> None:
        """Remembers a path that something else takes."""
        self._taken[os.path.realpath(path)] = whose

    def check(self, option: str, path: str | os.PathLike[str] | None, suffixes: Sequence[str]) -> None:
        """Remembers where an option's file is to be written; without a path there will be none.

        Raises:
            UsageError: it has another suffix, is the output, a checkpoint, a shard index, a folder or another option's
                file, or its folder does not exist.
            OutputError: it exists and may not be replaced, or its folder cannot be written.
        """
        if path is None:
            return
        if os.path.splitext(path)[1].lower() not in suffixes:
            raise UsageError(f"{option} {path}: expected a name that ends in {' or '.join(suffixes)}.")
        taken = self._taken.setdefault(os.path.realpath(path), option)
        if taken != option:
            raise UsageError(f"{option} {path}: is {taken}'s own path. Choose another one.")
        if os.path.basename(path).endswith(INDEX_SUFFIX):
            raise UsageError(f"{option} {path}: is the name of a shard index. Choose another one.")
        try:
            refuse_output_among(path, discover(self._sources))
            self._targets[option] = check_target(path, overwrite=self._overwrite)
        except UsageError as error:
            raise UsageError(f"{option}: {error}") from error
        except OutputError as error:
            raise OutputError(f"{option}: {error}") from error

    def publish(self, option: str, contents: Callable[[], bytes]) -> None:
        """Writes an option's file, whole or not at all, if one was asked for.

        Raises:
            OutputError: it could not be made or written; whatever else was done stands.
        """
        target = self._targets.get(option)
        if target is None:
            return
        try:
            whole = contents()
            with atomic_output(target, len(whole)) as unpublished:
                unpublished.write(whole, 0)
                unpublished.publish(overwrite=self._overwrite)
        except OutputError as error:
            raise OutputError(f"{option}: {error} All else was done.") from error


def as_bytes(document: Mapping[str, object]) -> bytes:
    """Returns a JSON document for a file."""
    return f"{json.dumps(document, indent=2)}\n".encode()
