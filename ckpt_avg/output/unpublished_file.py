"""The output while it is written: until `UnpublishedFile.publish` its path is absent or an older file, never a part.

The data goes to a file without a name (``O_TMPFILE``). If the file system has none, or several ranks fill the file, it
has a hidden name next to the output. Space is reserved first. Publishing syncs the data, gives the file its name in
one system call, and syncs the folder, because POSIX lets a crash lose a name whose folder was not synced. A file whose
fsync failed is discarded: the kernel has marked its pages clean, so a second fsync would succeed without writing them
(Rebello et al., USENIX ATC 2020).

A run that is killed can leave a file under its hidden name, which the next run removes (see `hidden_names`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import CheckpointFormatError, OutputError
from ckpt_avg.files import platform
from ckpt_avg.output.hidden_names import hidden_name, remove_leftovers
from ckpt_avg.output.new_folders import NewFolders
from ckpt_avg.text import size as readable_size

# Bytes per write call. Larger writes make the page cache allocate large blocks, which first have to be found, or to be
# fetched from the host of a virtual machine: measured up to 20 times slower.
_WRITE_SIZE = 256 * 1024
_MARK = 8  # bytes by which other ranks recognise the file; no safetensors file is shorter


class UnpublishedFile:
    """The output while it is written. Threads may write at the same time.

    Args:
        target: its path once it is published.
        shown: what messages call it, by default ``target``.
    """

    def __init__(self, target: Path, shown: Path | None = None) -> None:
        self.target, self.shown = target, shown or target
        self._fd = -1
        self._temporary: Path | None = None
        self._folders = NewFolders()

    def set_hidden_name(self, name: str) -> None:
        """Sets the hidden name. `close` removes that file, so the name must be known before the file exists."""
        self._temporary = self.target.with_name(name)

    def open(self, size: int) -> None:
        """Creates the file, and its folder if there is none, and reserves ``size`` bytes for it."""
        try:
            self._folders.make(self.target.parent)
            remove_leftovers(self.target)
            refuse_too_large(self.target.parent, size, self.shown)
            descriptor = platform.open_unnamed(self.target.parent) if self._temporary is None else None
            if descriptor is not None:
                platform.lock(descriptor)
            else:
                self._temporary = self._temporary or self.target.with_name(hidden_name(self.target))
                descriptor = _create(self._temporary)
            self._fd = descriptor
        except OSError as error:
            raise output_error(self.shown, "creating the file failed", error) from error
        try:
            platform.reserve(self._fd, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise output_error(self.shown, f"reserving {readable_size(size)} failed", error) from error
            self._remove()  # gives back what was reserved before the disk was full
            refuse_too_large(self.target.parent, size, self.shown)
            raise OutputError(
                f"{self.shown}: not enough space: the system does not reserve {readable_size(size)}: "
                f"{error.strerror}. Free some space or write elsewhere."
            ) from error

    def open_existing(self) -> None:
        """Opens the file that rank 0 has created under the hidden name."""
        try:
            self._fd = os.open(self.readable_path, platform.WRITE_FLAGS)
        except OSError as error:
            raise OutputError(
                f"{self.shown}: the file that rank 0 created cannot be opened here: {error.strerror}. Write to "
                "storage that all ranks share."
            ) from error

    @property
    def readable_path(self) -> Path:
        """A path by which this process can read the file before it is published."""
        return self._temporary or Path(f"/proc/self/fd/{self._fd}")

    def write(self, contents: memoryview | bytes, offset: int) -> None:
        """Writes all of ``contents`` at ``offset``.

        Raises:
            OutputError: the system refused.
        """
        rest = memoryview(contents).cast("B")
        begin, length = offset, len(rest)
        while len(rest):
            try:
                count = platform.write_at(self._fd, rest[:_WRITE_SIZE], offset)
            except OSError as error:
                raise output_error(self.shown, "writing failed", error) from error
            rest, offset = rest[count:], offset + count
        platform.start_writing(self._fd, begin, length)

    def read(self, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes from ``offset``.

        Raises:
            OutputError: the system refused, or the file is shorter.
        """
        found = self.read_available(offset, length)
        if len(found) < length:
            raise OutputError(
                f"{self.shown}: the unpublished file has only {len(found):,} of {length:,} bytes at byte {offset:,}. "
                "Another program changed it: run again."
            )
        return found

    def read_available(self, offset: int, length: int) -> bytes:
        """Returns what the file has of ``length`` bytes from ``offset``."""
        found = bytearray(length)
        done = 0
        try:
            while done < length and (count := platform.read_into(self._fd, [memoryview(found)[done:]], offset + done)):
                done += count
        except OSError as error:
            raise output_error(self.shown, "reading back failed", error) from error
        return bytes(found[:done])

    def drop_cache(self) -> None:
        """Drops the cached contents of the file, after other machines have written to it."""
        platform.drop_cache(self._fd)

    def sync(self) -> None:
        """Makes what this process has written durable.

        Raises:
            OutputError: the system could not.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise output_error(self.shown, "fsync failed, so the data is discarded", error) from error

    def publish(self, *, overwrite: bool) -> bool:
        """Makes the file durable and gives it its name.

        Returns:
            Whether the name is durable, too: some file systems have no fsync for folders.

        Raises:
            OutputError: syncing failed, or the path exists by now and ``overwrite`` is off. Nothing is published then.
        """
        self.sync()
        if sys.platform == "win32":
            self._close_descriptor()  # Windows renames no open file
        try:
            if overwrite:
                self._replace()
            else:
                self._link()
        except FileExistsError as error:
            raise OutputError(
                f"{self.shown}: was created by something else during the run, and is kept. Choose another path, or "
                "use --overwrite."
            ) from error
        except OSError as error:
            raise output_error(self.shown, "publishing failed", error) from error
        try:
            return self._folders.sync(self.target.parent)
        except OSError as error:
            is_published = self.shown == self.target  # not if its folder has a hidden name
            effect = "written, but syncing its folder failed, so a crash may lose it"
            raise output_error(self.shown, effect if is_published else "fsync of its folder failed", error) from error

    def _link(self) -> None:
        if self._temporary is None:
            platform.link_unnamed(self._fd, self.target)
            return
        try:
            os.link(self._temporary, self.target)
        except FileExistsError:
            raise
        except (OSError, AttributeError):
            # No hard links here (FAT, some network file systems): check, then rename, which is not one step.
            if os.path.lexists(self.target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target)) from None
            os.rename(self._temporary, self.target)
            self._temporary = None

    def _replace(self) -> None:
        if self._temporary is None:
            # A link cannot replace a name, so the file gets a temporary one first.
            self._temporary = self.target.with_name(hidden_name(self.target))
            platform.link_unnamed(self._fd, self._temporary)
        os.replace(self._temporary, self.target)
        self._temporary = None

    def _close_descriptor(self) -> None:
        if self._fd >= 0:
            descriptor, self._fd = self._fd, -1
            platform.close(descriptor)

    def close(self) -> None:
        """Closes the file and removes its hidden name. An unpublished file, and a folder made for it, are gone."""
        self._remove()
        self._folders.remove()

    def _remove(self) -> None:
        self._close_descriptor()
        if self._temporary is not None:
            with contextlib.suppress(OSError):  # gone or out of reach: the error that led here matters more
                os.unlink(self._temporary)
            self._temporary = None


@contextlib.contextmanager
def unpublished_file(target: Path, size: int, *, shown: Path | None = None) -> Iterator[UnpublishedFile]:
    """Yields one file of one process, as `unpublished_files` does."""
    with unpublished_files([target], [size], shown=[shown or target]) as (file,):
        yield file


@contextlib.contextmanager
def unpublished_files(
    targets: Sequence[Path], sizes: Sequence[int], ranks: Ranks | None = None, *, shown: Sequence[Path] | None = None
) -> Iterator[list[UnpublishedFile]]:
    """Yields files with reserved bytes, which vanish unless they are published.

    Several ranks get the same files. If the work fails, any surviving rank removes them; they stay only if all ranks
    are killed at once.

    Args:
        targets: their paths once they are published.
        sizes: bytes to reserve for each.
        ranks: that fill them together.
        shown: what messages call the paths; by default themselves.

    Raises:
        OutputError: a folder cannot be written to, has no room, or is not the same folder for all ranks.
        RankError: another rank failed.
    """
    files = [UnpublishedFile(target, name) for target, name in zip(targets, shown or targets, strict=True)]
    try:
        if ranks is None or ranks.size == 1:
            for file, size in zip(files, sizes, strict=True):
                file.open(size)
            yield files
            return
        with ranks.share_errors():  # before the files are closed, and removed
            try:
                _open_shared(files, sizes, ranks)
                yield files
            except (OutputError, CheckpointFormatError, OSError):
                # If another rank fails, it removes the files, maybe before its failure is known here. An error that
                # follows from that is not the cause.
                ranks.check(at_once=True)
                raise
    finally:
        for file in reversed(files):
            file.close()


def _open_shared(files: Sequence[UnpublishedFile], sizes: Sequence[int], ranks: Ranks) -> None:
    # Every rank knows the names before the files exist, so that any rank can remove them.
    agreed = ranks.exchange(
        "output", None, lambda _: [[hidden_name(file.target), os.urandom(_MARK).hex()] for file in files]
    )
    for file, (name, _) in zip(files, agreed, strict=True):
        file.set_hidden_name(name)
    if ranks.is_first:
        for file, size, (_, mark) in zip(files, sizes, agreed, strict=True):
            file.open(size)
            file.write(bytes.fromhex(mark), 0)
            file.sync()
    ranks.exchange("output created", None)
    for file, (_, mark) in zip(files, agreed, strict=True) if not ranks.is_first else ():
        file.open_existing()
        if file.read_available(0, _MARK).hex() != mark:
            raise OutputError(
                f"{file.shown}: this rank sees another file than rank 0 is writing. Write to storage that all ranks "
                "share."
            )
    ranks.exchange("output opened", None)


def refuse_too_large(folder: Path, size: int, shown: Path) -> None:
    """Raises OutputError if a folder has no room for ``size`` bytes; the message calls the output ``shown``.

    Called before anything is reserved: that would take the whole disk from others until it fails.
    """
    free = platform.free_space(folder)
    if size > free:
        raise OutputError(
            f"{shown}: not enough space: it needs {readable_size(size)}, and {readable_size(free)} are free. Free some "
            "space or write elsewhere."
        )


def publish_bytes(target: Path, contents: bytes, *, overwrite: bool) -> None:
    """Writes a small file: complete, or not at all."""
    with unpublished_file(target, len(contents)) as file:
        file.write(contents, 0)
        file.publish(overwrite=overwrite)


def _create(path: Path) -> int:
    """Creates and locks a file; returns its descriptor."""
    while True:
        descriptor = os.open(path, platform.WRITE_FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        platform.lock(descriptor, wait=True)
        if os.path.exists(path):
            return descriptor
        platform.close(descriptor)  # another run took it for a leftover before it was locked


def output_error(target: Path, what: str, error: OSError) -> OutputError:
    """Returns the error for an output that the system refused."""
    advice = "Check the disk and the permissions"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "Allow more open files with ulimit -n, or use a larger --max-shard-size"
    return OutputError(f"{target}: {what}: {error.strerror}. {advice}, then run again.")
