"""The folders that are made for an output, and go with it if it is not published."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ckpt_avg.files import platform


class NewFolders:
    """The folders that were made for one output, the outermost first."""

    def __init__(self) -> None:
        self._made: list[Path] = []

    def make(self, folder: Path) -> None:
        """Makes a folder and those around it, where they are missing. Raises OSError if that fails."""
        missing = [each for each in (folder, *folder.parents) if not os.path.isdir(each)]
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run has created it
                each.mkdir()
                self._made.append(each)

    def sync(self, parent: Path) -> bool:
        """Makes what was given a name in ``parent`` durable, and keeps the folders from now on.

        Returns:
            Whether all names are durable: some file systems have no fsync for folders.

        Raises:
            OSError: the system could not.
        """
        parents = [parent, *(folder.parent for folder in reversed(self._made))]
        self._made, synced = [], [platform.sync_folder(each) for each in parents]
        return all(synced)

    def remove(self) -> None:
        """Removes the folders. One that contains something stays."""
        with contextlib.suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()
        self._made = []
