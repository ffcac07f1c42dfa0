"""What the command must not do, done on purpose: each function makes it wrong in one way, which a test must catch.

`Runs.run` calls them in the process that it forks, with the arguments of the command. (`writing_slowly` is not wrong.)
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def without_fsync_of_the_file(arguments: Sequence[str]) -> None:
    """The output gets its name before its bytes are on the disk."""
    import ckpt_avg.files.platform

    _change_fsync(lambda mode: not stat.S_ISREG(mode))
    # What it began might be there in time.
    ckpt_avg.files.platform.start_writing = lambda descriptor, offset, length: None


def without_fsync_of_the_folder(arguments: Sequence[str]) -> None:
    """The bytes are on the disk, and the name may not be."""
    _change_fsync(lambda mode: not stat.S_ISDIR(mode))


def _change_fsync(wanted: Callable[[int], bool]) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if wanted(os.fstat(descriptor).st_mode):
            real(descriptor)

    os.fsync = fsync


def in_place(arguments: Sequence[str]) -> None:
    """The output grows under its own name, and what is on the disk of it stays there whatever happens."""
    from ckpt_avg.output.unpublished_file import UnpublishedFile

    real = UnpublishedFile.write

    def open_in_place(file: UnpublishedFile, size: int) -> None:
        file._fd = os.open(file.target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(file._fd, size)

    def write(file: UnpublishedFile, contents: memoryview | bytes, offset: int) -> None:
        real(file, contents, offset)
        file.sync()

    UnpublishedFile.write = write  # type: ignore[method-assign]
    UnpublishedFile.open = open_in_place  # type: ignore[method-assign]
    UnpublishedFile.publish = lambda file, *, overwrite: file.sync()  # type: ignore[method-assign]


def naive(arguments: Sequence[str]) -> Any:
    """Returns a command that copies the first checkpoint into the output itself, bit by bit."""

    def write(arguments: Sequence[str]) -> int:
        contents = Path(arguments[1]).read_bytes()
        descriptor = os.open(arguments[arguments.index("-o") + 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        step = max(1, len(contents) // 12)
        for offset in range(0, len(contents), step):
            os.pwrite(descriptor, contents[offset : offset + step], offset)
            os.fsync(descriptor)
        return 0

    return write


def writing_slowly(arguments: Sequence[str]) -> None:
    """Nothing wrong: moments spread over a run then fall mostly between two writes."""
    from ckpt_avg.output.unpublished_file import UnpublishedFile

    real = UnpublishedFile.write

    def write(file: UnpublishedFile, contents: memoryview | bytes, offset: int) -> None:
        real(file, contents, offset)
        time.sleep(0.02)

    UnpublishedFile.write = write  # type: ignore[method-assign]


def swallowing_errors_of_writes(arguments: Sequence[str]) -> None:
    """A write that failed passes for done."""
    real = os.pwrite

    def pwrite(descriptor: int, contents: Any, offset: int) -> int:
        try:
            return real(descriptor, contents, offset)
        except OSError:
            return len(contents)

    os.pwrite = pwrite


def keeping_hidden_files(arguments: Sequence[str]) -> None:
    """What was not published stays, under its hidden name."""
    from ckpt_avg.output.unpublished_file import UnpublishedFile

    UnpublishedFile.close = UnpublishedFile._close_descriptor  # type: ignore[method-assign]


def taking_signals_for_one(arguments: Sequence[str]) -> None:
    """SIGTERM and SIGHUP are reported as Ctrl-C."""
    import ckpt_avg.cli.signals

    ckpt_avg.cli.signals.Terminated = lambda number: KeyboardInterrupt()  # type: ignore[assignment,misc]


def opening_inputs_for_writing(arguments: Sequence[str]) -> None:
    """Every input is opened so that it could be written to."""
    import ckpt_avg.files.platform

    ckpt_avg.files.platform.READ_FLAGS |= os.O_RDWR


def touching_inputs(arguments: Sequence[str]) -> None:
    """Once they have been read, the times of inputs are put back, as tools do that mean well."""
    from ckpt_avg.files.input_file import InputFile

    real = InputFile.close

    def close(file: InputFile) -> None:
        real(file)
        status = os.stat(file.path)
        os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns))

    InputFile.close = close  # type: ignore[method-assign]


def leaving_a_note(arguments: Sequence[str]) -> None:
    """A file appears next to the inputs, and is removed again."""
    from ckpt_avg.files.input_file import InputFile

    real = InputFile.close

    def close(file: InputFile) -> None:
        real(file)
        if file.path.parent != Path("/proc/self/fd"):  # the output, before it has a name
            note = file.path.with_suffix(".lock")
            note.touch()
            note.unlink()

    InputFile.close = close  # type: ignore[method-assign]


def not_looking_again(arguments: Sequence[str]) -> None:
    """A file that has changed meanwhile passes for the same."""
    from ckpt_avg.files.input_file import InputFile

    InputFile.check_unchanged = lambda file: None  # type: ignore[method-assign]


def cutting_an_input(arguments: Sequence[str]) -> None:
    """Nothing wrong with the command: the second checkpoint is cut just before it is mapped and read."""
    _before_reading(lambda: os.truncate(arguments[2], 0))


def overwriting_an_input(arguments: Sequence[str]) -> None:
    """Nothing wrong with the command: half of the second checkpoint is written anew just before it is read."""

    def overwrite() -> None:
        half = os.path.getsize(arguments[2]) // 2
        with open(arguments[2], "r+b") as file:
            file.seek(half)
            file.write(bytes(half))

    _before_reading(overwrite)


def _before_reading(change: Callable[[], None]) -> None:
    """Has the native engine change something before it reads the first tensor."""
    from ckpt_avg import _kernel

    real, lock, changed = _kernel.mean, threading.Lock(), []

    def mean(*call: Any) -> Any:
        with lock:
            if not changed:
                change()
                changed.append(True)
        return real(*call)

    _kernel.mean = mean


def creating_early(arguments: Sequence[str]) -> None:
    """A file without a name is made in the output's folder before anything was checked; nobody can see it there."""
    import ckpt_avg.runs.discover

    folder = Path(arguments[arguments.index("-o") + 1]).parent
    real = ckpt_avg.runs.discover.discover

    def discover(*positional: Any, **keywords: Any) -> Any:
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600))
        return real(*positional, **keywords)

    ckpt_avg.runs.discover.discover = discover
