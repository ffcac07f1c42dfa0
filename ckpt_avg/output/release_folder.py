"""An output that is a folder: until `ReleaseFolder.publish` its path is absent or an older folder, never a part.

Everything is written to one hidden folder next to it, and each file is made durable there. Publishing renames that
folder, which is one system call: onto nothing or an empty folder, or in exchange with an older output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import CheckpointFormatError, OutputError
from ckpt_avg.files import platform
from ckpt_avg.output.folder_paths import entries, refuse_foreign
from ckpt_avg.output.hidden_names import hidden_name, remove_folder, remove_leftovers
from ckpt_avg.output.new_folders import NewFolders
from ckpt_avg.output.unpublished_file import output_error, unpublished_file
from ckpt_avg.text import listing, quote


class ReleaseFolder:
    """An output folder while it is written.

    Attributes:
        target: the path that it will get.
        path: the hidden folder, where its files are written.
    """

    def __init__(self, target: Path, name: str) -> None:
        self.target = target
        self.path = target.with_name(name)
        self._lock = -1
        self._folders = NewFolders()

    def open(self) -> None:
        """Creates and locks the hidden folder, and the folder around it if there is none.

        Raises:
            OutputError: the system refused.
        """
        try:
            self._folders.make(self.target.parent)
            remove_leftovers(self.target)
            while self._lock < 0:
                self.path.mkdir()
                self._lock = self._locked()
            if os.path.isdir(self.target):
                os.chmod(self.path, stat.S_IMODE(os.stat(self.target).st_mode))
        except OSError as error:
            raise output_error(self.target, "creating the folder failed", error) from error

    def _locked(self) -> int:
        """Locks the hidden folder; returns the descriptor, or -1 if another run took it for a leftover before that."""
        if os.name == "nt":
            return 0
        descriptor = platform.open_folder(self.path)
        platform.lock(descriptor, wait=True)
        if os.path.isdir(self.path):
            return descriptor
        platform.close(descriptor)
        return -1

    def add(self, name: str, size: int, contents: Iterable[bytes]) -> None:
        """Writes a file of so many bytes, and makes it durable; folders in its name are made.

        Raises:
            OutputError: the system refused.
        """
        offset = 0
        with unpublished_file(self.path / name, size, shown=self.target / name) as file:
            for each in contents:
                file.write(each, offset)
                offset += len(each)
            file.publish(overwrite=False)

    def publish(self, files: Collection[str], *, overwrite: bool) -> bool:
        """Makes the names in the folder durable, and gives it its own.

        Only an older output of this package is replaced. It is removed when this folder is closed.

        Args:
            files: the names of all its files.
            overwrite: whether an older output may be replaced.

        Returns:
            Whether its name is durable, too: some file systems have no fsync for folders.

        Raises:
            OutputError: the system refused, other files are in the folder, or something is at the path and
                ``overwrite`` is off. Nothing is published then.
        """
        try:
            others = set(entries(self.path)) ^ set(files)
            if others:
                raise OutputError(
                    f"{self.target}: is not what was written: another program changed {listing(map(quote, others))}. "
                    "Run again."
                )
            for folder, _, _ in os.walk(self.path, topdown=False):
                platform.sync_folder(Path(folder))
        except OSError as error:
            raise output_error(self.target, "fsync failed, so the folder is discarded", error) from error
        if os.path.isdir(self.target):
            refuse_foreign(self.target, str(self.target), overwrite=overwrite)
        try:
            self._replace() if overwrite and os.path.isdir(self.target) else self._rename()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputError(
                    f"{self.target}: something was put there during the run, and is kept. Choose another path."
                ) from error
            raise output_error(self.target, "publishing failed", error) from error
        try:
            return self._folders.sync(self.target.parent)
        except OSError as error:
            raise output_error(
                self.target, "written, but syncing its folder failed, so a crash may lose it", error
            ) from error

    def _rename(self) -> None:
        if os.name == "nt" and os.path.isdir(self.target):
            os.rmdir(self.target)  # Windows renames onto nothing
        os.rename(self.path, self.target)

    def _replace(self) -> None:
        if platform.exchange(self.path, self.target):
            return
        # In two steps: between them, nothing is at the path.
        old = self.target.with_name(hidden_name(self.target))
        os.rename(self.target, old)
        try:
            os.rename(self.path, self.target)
        except BaseException:
            os.rename(old, self.target)
            raise
        self.path = old

    def close(self) -> None:
        """Removes what is at the hidden name: an unpublished folder, or an old one that was replaced."""
        unwanted = self.target.with_name(hidden_name(self.target))
        try:
            self._remove(unwanted)
        except BaseException:  # a signal
            self._remove(unwanted)
            raise
        finally:
            self._folders.remove()
        if self._lock > 0:
            descriptor, self._lock = self._lock, -1
            platform.close(descriptor)

    def _remove(self, unwanted: Path) -> None:
        # Renamed first: another rank may be about to publish it, and must find all of it or nothing.
        with contextlib.suppress(OSError):
            os.rename(self.path, unwanted)
        remove_folder(unwanted)


@contextlib.contextmanager
def release_folder(target: Path, ranks: Ranks | None = None) -> Iterator[ReleaseFolder]:
    """Yields an output folder, which vanishes unless it is published.

    Rank 0 creates it, adds side files and publishes it. If the work fails, any surviving rank removes it.

    Raises:
        OutputError: it cannot be created.
        RankError: another rank failed.
    """
    ranks = ranks or Ranks()
    # Every rank knows the name before the folder exists, so that any rank can remove it.
    folder = ReleaseFolder(target, ranks.exchange("output folder", None, lambda _: hidden_name(target)))
    try:
        with ranks.share_errors() if ranks.size > 1 else contextlib.nullcontext():
            try:
                if ranks.is_first:
                    folder.open()
                ranks.exchange("output folder created", None)
                yield folder
            except (OutputError, CheckpointFormatError, OSError):
                if ranks.size > 1:
                    ranks.check(at_once=True)  # the cause may be that a rank that failed has removed the folder
                raise
    finally:
        folder.close()
