"""One input file, read at checked offsets: mapped or copied, the bytes are the same and nothing blocks or kills."""

from __future__ import annotations

import errno
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckpt_avg.errors import ChangedWhileReadingError, CheckpointFormatError, ResourceError
from ckpt_avg.files import platform
from ckpt_avg.files.input_file import FileRange, InputFile

PAGE = mmap.PAGESIZE
SMALL = 64 * 1024
CONTENT = random.Random(1).randbytes(3 * SMALL + 777)

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[InputFile]:
    with InputFile(path) as opened:
        yield opened


RANGES = [
    (0, len(CONTENT)),
    (0, SMALL),
    (1, SMALL),
    (0, SMALL - 1),
    (PAGE, SMALL),
    (PAGE - 1, SMALL + 2),
    (PAGE + 1, 2 * SMALL),
    (len(CONTENT) - SMALL, SMALL),
    (len(CONTENT) - SMALL - 1, SMALL + 1),
    (len(CONTENT) - 1, 1),
    (len(CONTENT), 0),
    (0, 0),
    (17, 0),
    (17, 5),
    (12345, SMALL + 4321),
]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_each_range_gives_the_bytes_of_the_file(file: InputFile, offset: int, length: int) -> None:
    """Aligned or not, at the end of the file, empty, small and large."""
    assert file.read(offset, length) == CONTENT[offset : offset + length]
    target = bytearray(length)
    file.read_into(memoryview(target), offset)
    assert target == CONTENT[offset : offset + length]


LENGTHS = [[0], [5, 0, 7], [1] * 3_000, [SMALL, 1, SMALL, 777], [*range(300)]]


@pytest.mark.parametrize("most", [1, 100, SMALL + 1, None])
@pytest.mark.parametrize("lengths", LENGTHS, ids=[f"{len(each)} targets" for each in LENGTHS])
def test_targets_are_filled_in_turn_however_little_the_system_reads(
    file: InputFile, monkeypatch: pytest.MonkeyPatch, lengths: list[int], most: int | None
) -> None:
    """Empty ones, and more of them than one call may have, included."""

    def read(descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
        chunk = os.pread(descriptor, min(most or 2**30, sum(map(len, targets[:1_024]))), offset)
        done = 0
        for target in targets:
            part = chunk[done : done + len(target)]
            target[: len(part)] = part
            done += len(part)
        return done

    if most is not None:
        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(platform, "read", lambda fd, length, offset: os.pread(fd, min(length, most), offset))
    targets = [memoryview(bytearray(length)) for length in lengths]
    file.read_into_each(targets, 11)
    assert b"".join(targets) == CONTENT[11 : 11 + sum(lengths)]
    assert file.read(11, SMALL + 50) == CONTENT[11 : 11 + SMALL + 50]


@pytest.mark.parametrize("most", [1, 3, None])
def test_many_small_reads_are_each_whole_and_in_order(
    file: InputFile, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    if most is not None:
        monkeypatch.setattr(platform, "read", lambda fd, length, offset: os.pread(fd, min(length, most), offset))
    offsets = [len(CONTENT) - 4, 0, 17, 17, 5_000]
    assert file.read_each(offsets, 4) == [CONTENT[offset : offset + 4] for offset in offsets]
    assert file.read_each([], 4) == []
    for beyond in (-1, len(CONTENT) - 3):
        with pytest.raises(CheckpointFormatError, match=f"got a file of {len(CONTENT):,} bytes"):
            file.read_each([0, beyond], 4)
    os.truncate(file.path, 18)
    with pytest.raises(ChangedWhileReadingError):
        file.read_each([0, 17], 4)


def test_targets_are_not_filled_from_beyond_the_file(file: InputFile) -> None:
    targets = [memoryview(bytearray(len(CONTENT) - 10)), memoryview(bytearray(11))]
    with pytest.raises(CheckpointFormatError, match=f"got a file of {len(CONTENT):,} bytes"):
        file.read_into_each(targets, 0)
    os.truncate(file.path, SMALL)
    with pytest.raises(ChangedWhileReadingError):
        file.read_into_each([targets[0]], 0)


@pytest.mark.parametrize("call", ["pread", "pread, each", "preadv"])
def test_a_read_that_fails_names_the_file_the_byte_and_the_reason(
    file: InputFile, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, call.removesuffix(", each"), fail)
    with pytest.raises(CheckpointFormatError, match=f"data.bin: reading at byte 7 failed: {os.strerror(errno.EIO)}"):
        if call == "pread":
            file.read(7, 5)
        elif call == "pread, each":
            file.read_each([7, 1], 5)
        else:
            file.read_into_each([memoryview(bytearray(5))], 7)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (0, -1), (0, len(CONTENT) + 1), (len(CONTENT), 1), (2**63, 1), (1, 2**63), (2**64, 2**64)],
)
def test_no_read_leaves_the_file(file: InputFile, offset: int, length: int) -> None:
    with pytest.raises(CheckpointFormatError) as caught:
        file.read(offset, length)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert type(caught.value) is CheckpointFormatError
    assert message.startswith(f"{file.path}: expected {length:,} bytes at byte {offset:,}, got a file of ")
    assert f"{len(CONTENT):,} bytes" in message
    assert "truncated or damaged: copy it again" in message


@pytest.mark.parametrize("length", [len(CONTENT) + 1, 2**40, 2**62])
def test_a_read_beyond_the_file_allocates_nothing(file: InputFile, length: int) -> None:
    with pytest.raises(CheckpointFormatError, match="got a file of"):
        file.read(0, length)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with InputFile(tmp_path / "empty") as opened:
        assert opened.size == 0
        assert opened.read(0, 0) == b""


@pytest.mark.guarantee("sparse-inputs")
def test_a_file_with_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as target:
        target.truncate(50_000_000)
        target.seek(49_000_000)
        target.write(b"x")
    with InputFile(path) as opened:
        assert opened.read(48_999_999, 3) == b"\0x\0"


def test_a_range_of_a_file_is_never_left(path: Path) -> None:
    """What is outside a part of a file belongs to another tensor."""
    with InputFile(path) as file:
        part = FileRange(file, 20, 50)
        assert (part.path, part.size, part.read(1, 4)) == (path, 50, CONTENT[21:25])
        for offset, length in ((-1, 1), (0, 51), (50, 1), (0, -1)):
            with pytest.raises(CheckpointFormatError, match=rf"expected {length} bytes at byte {20 + offset}\. It is"):
                part.read(offset, length)
        for begin, size in ((-1, 5), (0, -1), (0, len(CONTENT) + 1), (len(CONTENT), 1)):
            with pytest.raises(CheckpointFormatError, match=rf"expected {size:,} bytes at byte {begin:,}, got a"):
                FileRange(file, begin, size)


# --- what is no file ---------------------------------------------------------------------------------------


def opening_fails(path: Path, kind: type[Exception] = CheckpointFormatError) -> str:
    """Opens in a thread, so that blocking fails the test instead of hanging it."""
    raised: list[Exception] = []

    def attempt() -> None:
        try:
            InputFile(path).close()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "opening blocks"
    assert len(raised) == 1
    assert type(raised[0]) is kind
    assert str(raised[0]).startswith(f"{path}: ")
    return str(raised[0])


@pytest.mark.guarantee("not-a-file")
@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        ("pipe", "expected a checkpoint file, got a device, pipe or socket. Name a file"),
        ("device", "expected a checkpoint file, got a device, pipe or socket. Name a file"),
        ("socket", "cannot be opened: No such device or address"),
        ("folder", "expected a checkpoint file, got a folder. Name a file"),
    ],
)
def test_what_is_no_file_is_refused_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fact: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("pipe")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    assert fact in opening_fails(Path("/dev/zero") if kind == "device" else tmp_path / kind)


@pytest.mark.parametrize("name", ["gone", "link", "loop", "x" * 300])
def test_what_cannot_be_opened_says_why(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    code = {"gone": errno.ENOENT, "link": errno.ENOENT, "loop": errno.ELOOP}.get(name, errno.ENAMETOOLONG)
    assert f"cannot be opened: {os.strerror(code)}" in opening_fails(tmp_path / name)


@linux
def test_refused_files_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for path in (tmp_path, Path("/dev/null"), tmp_path / "gone"):
            with pytest.raises(CheckpointFormatError):
                InputFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


LIMITED = """
import os, resource, sys
from pathlib import Path
from ckpt_avg.errors import TooManyFilesError
from ckpt_avg.files.input_file import InputFile

path, soft, hard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
kept = []
try:
    for _ in range(int(sys.argv[4])):
        kept.append(InputFile(path))
except TooManyFilesError as error:
    print(error.exit_code, error)
kept.append(InputFile(path, reserve=0))  # as the output is read back
print(len(kept), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.guarantee("open-files")
@linux
def test_the_soft_limit_on_open_files_is_raised(path: Path) -> None:
    """400 checkpoints of 1,000 shards are more files than the usual 1,024."""
    done = run(LIMITED, path, 20, 200, 100)
    assert done.stdout == "101 200 200\n", done.stderr


@pytest.mark.guarantee("open-files")
@linux
def test_more_files_than_the_hard_limit(path: Path) -> None:
    """The error names the limit and the command; some descriptors are left to write the output with, and to read it."""
    done = run(LIMITED, path, 20, 100, 100)
    error, end = done.stdout.splitlines()
    assert error == (
        f"6 {path}: at least 101 files have to be open at once, but the limit is 100. Allow more with `ulimit -n 201` "
        "(as root), or average fewer checkpoints."
    )
    opened, *limits = map(int, end.split())
    assert limits == [100, 100]
    assert 60 <= opened <= 75


@pytest.mark.guarantee("open-files")
@linux
def test_no_descriptor_is_left_at_all(path: Path) -> None:
    """Where the rest of the process has taken them all, the error says the same."""
    taken = "kept = []\ntry:\n    while True: kept.append(os.open(path, os.O_RDONLY))\nexcept OSError: pass\nkept = []"
    taken = taken.replace("kept", "taken", 4)
    done = run(LIMITED.replace("kept = []", f"{taken}\nkept = []"), path, 20, 20, 1)
    assert done.stdout.startswith(f"6 {path}: at least 21 files have to be open at once"), done


@pytest.mark.parametrize("code", [errno.ENFILE, errno.EMFILE])
def test_the_system_has_no_descriptor_left(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Not a damaged file: exit 6, with or without a limit of this process."""

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(platform, "raise_open_file_limit", lambda: None)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match=rf"cannot be opened: {os.strerror(code)}. Close other programs"):
        InputFile(path)


def test_a_closed_file_is_not_read(file: InputFile) -> None:
    file.close()
    with pytest.raises(ValueError, match="is closed"):
        file.read(0, 1)


# --- changes while reading ---------------------------------------------------------------------------------


def test_an_unchanged_file_is_unchanged(file: InputFile) -> None:
    file.read(0, len(CONTENT))
    file.check_unchanged()


@pytest.mark.parametrize("change", ["shorter", "longer", "same length", "touched"])
def test_a_changed_file_is_noticed(file: InputFile, change: str) -> None:
    if change == "shorter":
        os.truncate(file.path, 10)
    elif change == "longer":
        with file.path.open("ab") as target:
            target.write(b"x")
    elif change == "same length":
        time.sleep(0.02)  # the clock of a file system may tick as slowly as that
        with file.path.open("r+b") as target:
            target.write(b"x")
    else:
        os.utime(file.path, ns=(1, 1))
    with pytest.raises(ChangedWhileReadingError) as caught:
        file.check_unchanged()
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.startswith(f"{file.path}: changed while reading: expected {len(CONTENT):,} bytes")
    assert f"got {file.path.stat().st_size:,} bytes" in message
    assert "Wait until nothing writes to it, then run again." in message


@pytest.mark.guarantee("changing-inputs")
@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_deleting_or_replacing_a_file_does_not_matter(file: InputFile, change: str) -> None:
    """What was opened stays readable."""
    if change == "replaced":
        other = file.path.with_name("other")
        other.write_bytes(b"y" * len(CONTENT))
        other.replace(file.path)
    else:
        file.path.unlink()
    assert file.read(5, SMALL) == CONTENT[5 : 5 + SMALL]
    file.check_unchanged()


@pytest.mark.guarantee("changing-inputs")
@pytest.mark.parametrize("length", [0, 1, PAGE, SMALL, SMALL + 10])
@pytest.mark.parametrize("offset", [0, 1, SMALL])
def test_reading_a_truncated_file(file: InputFile, length: int, offset: int) -> None:
    os.truncate(file.path, length)
    with pytest.raises(ChangedWhileReadingError, match="changed while reading"):
        file.read(offset, 2 * SMALL)


def test_threads_share_a_file(file: InputFile) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        for _ in range(50):
            offset = chooser.randrange(len(CONTENT))
            length = chooser.randrange(len(CONTENT) - offset + 1)
            if file.read(offset, length) != CONTENT[offset : offset + length]:
                wrong.append(offset)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


def test_its_repr(file: InputFile) -> None:
    assert repr(file).startswith("InputFile(")
    assert repr(file).endswith("192.8 KiB)")


# --- what is mapped -----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux alone")
def test_files_are_mapped_only_on_request(file: InputFile) -> None:
    """Mapped pages of a slow or shrinking file are a risk that nobody takes without asking for it."""
    assert not file.is_mapped
    for way, is_mapped in (("mmap", True), ("auto", False), ("pread", False)):
        file.use_io(way)
        assert file.is_mapped == is_mapped, way


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_the_bytes_do_not_depend_on_it(tmp_path: Path, run_folder: Path, in_process: Any, io: str) -> None:
    code, _, err = in_process("average", run_folder, "--bn", "keep", "-o", tmp_path / io, "--io", io)
    assert code == 0, err
    code, _, err = in_process("average", run_folder, "--bn", "keep", "-o", tmp_path / "plain")
    assert (tmp_path / io).read_bytes() == (tmp_path / "plain").read_bytes()
