"""`unpublished_file`, one failing system call at a time, on one rank and on several."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from system.faults.rank_runs import in_threads

from ckpt_avg import average
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import OutputError, RankError, UserCodeError
from ckpt_avg.files import platform
from ckpt_avg.output.unpublished_file import UnpublishedFile, unpublished_file, unpublished_files

CONTENTS = bytes(range(256)) * 40


@pytest.fixture(params=["O_TMPFILE", "temporary name"])
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the unpublished file has a temporary name, as where the system has no O_TMPFILE."""
    if request.param == "temporary name":
        monkeypatch.delattr(os, "O_TMPFILE")
    return bool(request.param == "temporary name")


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def overwrite(request: pytest.FixtureRequest) -> bool:
    """Whether an old output is replaced."""
    return bool(request.param)


@pytest.fixture
def target(tmp_path: Path, overwrite: bool) -> Path:
    """The output, with an old one in place if it is to be replaced."""
    path = tmp_path / "mean.safetensors"
    if overwrite:
        path.write_bytes(b"old")
    return path


def write(target: Path, *, overwrite: bool, contents: bytes = CONTENTS) -> None:
    with unpublished_file(target, len(contents)) as file:
        file.write(contents, 0)
        file.publish(overwrite=overwrite)


def write_sized(target: Path, size: int) -> None:
    with unpublished_file(target, size):
        pytest.fail("it was opened")


def untouched(target: Path, overwrite: bool) -> bool:
    """Whether the folder is as it was."""
    names = os.listdir(target.parent)
    return names == (["mean.safetensors"] if overwrite else []) and (not overwrite or target.read_bytes() == b"old")


def failing(
    real: Callable[..., Any], code: int, *, times: int = -1, when: Callable[..., bool] = lambda *a: True
) -> Any:
    """A system call that fails, the first times or always, with a record of how often it was called."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if not when(*arguments):
            return real(*arguments, **keywords)
        call.count += 1  # type: ignore[attr-defined]
        if times < 0 or call.count <= times:  # type: ignore[attr-defined]
            raise OSError(code, os.strerror(code))
        return real(*arguments, **keywords)

    call.count = 0  # type: ignore[attr-defined]
    return call


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_a_published_file_is_complete_and_alone(target: Path, overwrite: bool, named: bool) -> None:
    write(target, overwrite=overwrite)
    assert target.read_bytes() == CONTENTS
    assert os.listdir(target.parent) == ["mean.safetensors"]
    assert os.stat(target).st_nlink == 1


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_unpublished_file_vanishes_after_any_exception_and_without_one(
    target: Path, overwrite: bool, named: bool, error: type[BaseException] | None
) -> None:
    with pytest.raises(error) if error else nullcontext(), unpublished_file(target, len(CONTENTS)) as file:
        file.write(CONTENTS, 0)
        if error:
            raise error
    assert untouched(target, overwrite)


def test_the_path_is_as_it_was_until_the_file_is_published(target: Path, overwrite: bool, named: bool) -> None:
    with unpublished_file(target, len(CONTENTS)) as file:
        file.write(CONTENTS, 0)
        assert target.exists() == overwrite
        assert file.readable_path.read_bytes() == CONTENTS
        file.publish(overwrite=overwrite)
        assert target.read_bytes() == CONTENTS


def test_threads_write_side_by_side(target: Path, overwrite: bool, named: bool) -> None:
    step = 100
    with unpublished_file(target, len(CONTENTS)) as file:
        with ThreadPoolExecutor(4) as pool:
            for at in range(0, len(CONTENTS), step):
                pool.submit(file.write, memoryview(CONTENTS)[at : at + step], at)
        file.publish(overwrite=overwrite)
    assert target.read_bytes() == CONTENTS


@pytest.mark.guarantee("interrupted-calls")
@pytest.mark.parametrize("most", [1, 7])
def test_short_writes_are_continued(
    target: Path, overwrite: bool, named: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, contents, offset: pwrite(fd, contents[:most], offset))
    write(target, overwrite=overwrite)
    assert target.read_bytes() == CONTENTS


FAILURES = [
    ("open", errno.EACCES, "creating the file failed"),
    ("open", errno.EROFS, "creating the file failed"),
    ("open", errno.EMFILE, "creating the file failed"),
    ("open", errno.EIO, "creating the file failed"),
    ("posix_fallocate", errno.EIO, "reserving 10.0 KiB failed"),
    ("posix_fallocate", errno.EFBIG, "reserving 10.0 KiB failed"),
    ("posix_fallocate", errno.ENOSPC, "not enough space: the system does not reserve 10.0 KiB: No space left"),
    ("posix_fallocate", errno.EDQUOT, "not enough space: the system does not reserve 10.0 KiB: Disk quota"),
    ("pwrite", errno.EIO, "writing failed"),
    ("pwrite", errno.ENOSPC, "writing failed"),
    ("pwrite", errno.EDQUOT, "writing failed"),
    ("pwrite", errno.EFBIG, "writing failed"),
    ("fsync", errno.EIO, "fsync failed, so the data is discarded"),
    ("fsync", errno.ENOSPC, "fsync failed, so the data is discarded"),
    ("fsync", errno.EDQUOT, "fsync failed, so the data is discarded"),
]


@pytest.mark.guarantee("write-errors", "fsync-errors", "file-size-limit")
@pytest.mark.parametrize(("call", "code", "says"), FAILURES)
def test_a_call_that_fails_is_an_error_and_leaves_nothing(
    target: Path, overwrite: bool, named: bool, call: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call is repeated: after a failed fsync the pages count as clean, so a second one would write nothing."""
    failed = failing(getattr(os, call), code, times=1)
    monkeypatch.setattr(os, call, failed)
    with pytest.raises(OutputError) as error:
        write(target, overwrite=overwrite)
    monkeypatch.undo()
    assert error.value.exit_code == 5
    assert str(error.value).startswith(f"{target}: {says}")
    if "space" in says:
        assert str(error.value).endswith(f": {os.strerror(code)}. Free some space or write elsewhere.")
    else:
        advice = "Check the disk and the permissions"
        if code == errno.EMFILE:  # many shards may be open
            advice = "Allow more open files with ulimit -n, or use a larger --max-shard-size"
        assert f": {os.strerror(code)}. {advice}, then run again." in str(error.value)
    assert failed.count == 1
    assert untouched(target, overwrite)


@pytest.mark.guarantee("fsync-errors")
@pytest.mark.parametrize(
    ("call", "code"),
    [("posix_fallocate", errno.EOPNOTSUPP), ("posix_fallocate", errno.EINVAL), ("fsync", errno.EINVAL)],
)
def test_a_file_system_that_cannot_reserve_or_sync_folders_is_accepted(
    target: Path, overwrite: bool, named: bool, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = failing(getattr(os, call), code, when=is_folder if call == "fsync" else lambda *arguments: True)
    monkeypatch.setattr(os, call, refused)
    write(target, overwrite=overwrite)
    assert refused.count == 1
    assert target.read_bytes() == CONTENTS


@pytest.mark.guarantee("fsync-errors")
def test_that_a_folder_cannot_be_synced_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 0 promises more on other file systems."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EINVAL, when=is_folder))
    result = average(tmp_path / "a.pt", tmp_path / "out.safetensors")
    assert any("this file system cannot sync a folder" in notice for notice in result.notices)


@pytest.mark.guarantee("fsync-errors")
def test_a_folder_that_fails_to_sync_is_an_error(
    target: Path, overwrite: bool, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 0 means that the output is durable, which it is not here."""
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, when=is_folder))
    with pytest.raises(OutputError) as error:
        write(target, overwrite=overwrite)
    assert error.value.exit_code == 5
    for fact in (str(target), "syncing its folder failed", "a crash may lose it", os.strerror(errno.EIO)):
        assert fact in str(error.value)
    assert os.listdir(target.parent) == ["mean.safetensors"]


@pytest.mark.parametrize("call", ["link", "replace", "rename"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.EMLINK])
def test_a_failed_publication_is_an_error_and_leaves_nothing(
    target: Path, overwrite: bool, named: bool, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = failing(getattr(os, call), code)
    monkeypatch.setattr(os, call, used)
    if call == "rename" and named and not overwrite:
        monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))  # without links, rename is used
    try:
        write(target, overwrite=overwrite)
    except OutputError as error:
        assert error.exit_code == 5
        for fact in (str(target), "publishing failed", os.strerror(code)):
            assert fact in str(error)
        assert untouched(target, overwrite)
        assert used.count == 1
    else:
        # Not used here, or done another way.
        assert used.count == 0 or (call == "link" and named)
        assert target.read_bytes() == CONTENTS
        assert os.listdir(target.parent) == ["mean.safetensors"]


def test_where_there_are_no_hard_links_a_rename_publishes_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))
    target = tmp_path / "mean.safetensors"
    write(target, overwrite=False)
    assert target.read_bytes() == CONTENTS
    with pytest.raises(OutputError, match="was created by something else during the run, and is kept"):
        write(target, overwrite=False, contents=b"ours")
    assert target.read_bytes() == CONTENTS
    assert os.listdir(tmp_path) == ["mean.safetensors"]


@pytest.mark.guarantee("no-clobber")
@pytest.mark.parametrize("other", ["file", "dangling link", "folder"])
def test_whatever_appears_at_the_path_is_kept(tmp_path: Path, named: bool, other: str) -> None:
    target = tmp_path / "mean.safetensors"
    kept = pytest.raises(OutputError, match="was created by something else during the run, and is kept")
    with kept as error, unpublished_file(target, 4) as file:
        file.write(b"ours", 0)
        if other == "file":
            target.write_bytes(b"theirs")
        elif other == "folder":
            target.mkdir()
        else:
            target.symlink_to("nowhere")
        file.publish(overwrite=False)
    assert error.value.exit_code == 5
    assert os.listdir(tmp_path) == ["mean.safetensors"]
    assert {"file": target.is_file, "folder": target.is_dir, "dangling link": target.is_symlink}[other]()
    assert other != "file" or target.read_bytes() == b"theirs"


@pytest.mark.guarantee("hidden-name")
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT])
def test_a_file_system_without_unnamed_files_gets_a_temporary_one(
    target: Path, overwrite: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How old kernels, NFS, FUSE and overlays answer O_TMPFILE."""
    unnamed = os.O_TMPFILE & ~os.O_DIRECTORY
    monkeypatch.setattr(os, "open", failing(os.open, code, when=lambda path, flags, *mode: bool(flags & unnamed)))
    with unpublished_file(target, 4) as file:
        hidden = file.readable_path
        assert hidden.parent == target.parent
        assert hidden.name.startswith(".mean.safetensors.")
        file.write(b"ours", 0)
        file.publish(overwrite=overwrite)
    assert target.read_bytes() == b"ours"
    assert os.listdir(target.parent) == ["mean.safetensors"]


def test_descriptors_are_closed(target: Path, overwrite: bool, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    write(target, overwrite=overwrite)
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
    with pytest.raises(OutputError):
        write(target, overwrite=True)
    monkeypatch.setattr(os, "posix_fallocate", failing(os.posix_fallocate, errno.EIO))
    with pytest.raises(OutputError):
        write(target, overwrite=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.guarantee("output-names")
@pytest.mark.parametrize(
    "name", ["x" * 255, "ü" * 127, "-o", " ", "a\nb", "x.safetensors.tmp", ".hidden", os.fsdecode(b"\xff")]
)
def test_names_of_any_kind_work(tmp_path: Path, named: bool, name: str) -> None:
    """Even at the system's limit of 255 bytes, which leaves no room for the suffix of the temporary name."""
    for overwrite in (False, True):
        write(tmp_path / name, overwrite=overwrite)
        assert (tmp_path / name).read_bytes() == CONTENTS
        assert os.listdir(tmp_path) == [name]


@pytest.mark.guarantee("output-mode")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
def test_the_mode_is_what_any_new_file_gets(target: Path, overwrite: bool, named: bool, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(target, overwrite=overwrite)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o666 & ~umask


def test_a_size_of_zero_is_an_empty_file(target: Path, overwrite: bool, named: bool) -> None:
    write(target, overwrite=overwrite, contents=b"")
    assert target.read_bytes() == b""


@pytest.mark.guarantee("disk-full")
def test_what_exceeds_the_free_space_is_refused_before_anything_is_reserved(
    target: Path, overwrite: bool, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reserving takes every free block from other programs before it fails."""
    status = os.statvfs(target.parent)
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: pytest.fail("it was reserved"))
    free = (status.f_bfree if os.geteuid() == 0 else status.f_bavail) * status.f_frsize
    with pytest.raises(OutputError, match=r"not enough space: it needs .*iB, and .*iB are free\. Free"):
        write_sized(target, free + 2**40)
    assert untouched(target, overwrite)


@pytest.mark.parametrize("blocks", [0, None])
def test_a_file_system_that_does_not_tell_its_free_space_is_used(
    target: Path, overwrite: bool, blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some FUSE file systems and a tmpfs without a limit have no blocks."""

    def statvfs(path: object) -> SimpleNamespace:
        if blocks is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return SimpleNamespace(f_blocks=blocks, f_bfree=0, f_bavail=0, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    write(target, overwrite=overwrite)
    assert target.read_bytes() == CONTENTS


# -- Folders and leftovers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [False, True])
def test_a_missing_folder_stays_if_the_file_does(tmp_path: Path, named: bool, other: bool) -> None:
    """Of a run that fails, only what others have put there meanwhile is left."""
    target = tmp_path / "a" / "b" / "mean.safetensors"
    with unpublished_file(target, 4) as file:
        assert target.parent.is_dir()
        if other:
            (target.parent / "theirs").touch()
        file.write(b"ours", 0)
    assert os.listdir(tmp_path) == (["a"] if other else [])
    write(target, overwrite=False)
    assert target.read_bytes() == CONTENTS


@pytest.mark.guarantee("durable")
def test_the_names_of_new_folders_are_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut could take the folder, and the output with it."""
    synced = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write(tmp_path / "a" / "b" / "mean.safetensors", overwrite=False)
    assert synced[1:] == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]


KILLED = """
import os, signal, sys
from pathlib import Path
from ckpt_avg.output.unpublished_file import unpublished_file
if sys.argv[2] == "temporary name":
    del os.O_TMPFILE
replace = os.replace
os.replace = lambda *names: (print("here", flush=True), sys.stdin.read(), replace(*names))
with unpublished_file(Path(sys.argv[1]), 4) as file:
    file.write(b"ours", 0)
    file.publish(overwrite=True)
"""


@pytest.mark.guarantee("hidden-name")
@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_the_next_run_removes_what_a_killed_one_has_left(tmp_path: Path, named: bool) -> None:
    """Each would be as large as the output. The file of a run that lives, and files of other names, stay."""
    target = tmp_path / "mean.safetensors"
    mode = "temporary name" if named else "O_TMPFILE"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    (left,) = os.listdir(tmp_path)
    others = [left.replace("mean", "sum"), f"{left}.tmp", left.replace(".tmp", "z.tmp")]
    for name in others:
        (tmp_path / name).touch()
    write(target, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted([left, *others, target.name])
    process.kill()
    process.communicate()
    write(target, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, target.name])


def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(
    target: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its creation and its lock it looks like one."""
    monkeypatch.delattr(os, "O_TMPFILE")
    lock, taken = platform.lock, []

    def late(descriptor: int, *, wait: bool = False) -> bool:
        if wait and not taken:
            taken.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.unlink(taken[0])
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(platform, "lock", late)
    write(target, overwrite=overwrite)
    assert taken
    assert target.read_bytes() == CONTENTS
    assert os.listdir(target.parent) == [target.name]


# -- The same file on several ranks ---------------------------------------------------------------------------------


def test_every_rank_writes_into_the_same_file(tmp_path: Path) -> None:
    """If it failed, ranks would each fill a part of a file of their own."""
    barrier = threading.Barrier(3)

    def work(ranks: Ranks) -> None:
        with unpublished_files([tmp_path / "a"], [30], ranks) as (file,):
            barrier.wait(5)  # until then the first bytes are a mark by which the file is known
            file.write(bytes([ranks.rank]) * 10, 10 * ranks.rank)
            ranks.exchange("written", None)
            assert file.readable_path.read_bytes() == b"\0" * 10 + b"\1" * 10 + b"\2" * 10
            if ranks.is_first:
                file.publish(overwrite=False)
            ranks.exchange("published", None)

    assert in_threads(3, work) == [None] * 3
    assert (tmp_path / "a").read_bytes() == b"\0" * 10 + b"\1" * 10 + b"\2" * 10
    assert os.listdir(tmp_path) == ["a"]


def test_its_name_is_temporary_and_nothing_is_left_without_publishing(tmp_path: Path) -> None:
    """If it failed, a failed run would leave files, or one that looks like an output."""

    def work(ranks: Ranks) -> list[str]:
        with unpublished_files([tmp_path / "a.safetensors"], [30], ranks):
            names = os.listdir(tmp_path)
            ranks.exchange("seen", None)
            return names

    for names in in_threads(3, work):
        assert len(names) == 1
        assert names[0].startswith(".a.safetensors.")
        assert names[0].endswith(".tmp")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_smaller_than_its_mark_is_cut_to_what_is_written(tmp_path: Path, size: int) -> None:
    """If it failed, tiny contents would be followed by bytes of the mark."""

    def work(ranks: Ranks) -> None:
        with unpublished_files([tmp_path / "a"], [8 + size], ranks) as (file,):
            if ranks.is_first:
                file.write(b"x" * (8 + size), 0)
                file.publish(overwrite=False)
            ranks.exchange("published", None)

    assert in_threads(2, work) == [None, None]
    assert (tmp_path / "a").read_bytes() == b"x" * (8 + size)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_whichever_rank_fails_nothing_is_left(tmp_path: Path, failing: int) -> None:
    """If it failed, each failed run would leave a file as large as the output."""

    def work(ranks: Ranks) -> None:
        with unpublished_files([tmp_path / "a"], [100], ranks):
            if ranks.rank == failing:
                raise UserCodeError("no")
            ranks.exchange("never", None)

    ends = in_threads(3, work)
    assert [type(end) for end in ends] == [UserCodeError if rank == failing else RankError for rank in range(3)]
    assert os.listdir(tmp_path) == []


def refusal_on_rank_1(folder: Path) -> str:
    """Opens the output on three ranks, of which rank 1 has a folder of its own; returns what that rank says."""
    for name in ("shared", "own"):
        (folder / name).mkdir()

    def work(ranks: Ranks) -> None:
        with unpublished_files([folder / ("own" if ranks.rank == 1 else "shared") / "a"], [100], ranks):
            pytest.fail("it was opened")

    ends = in_threads(3, work)
    assert type(ends[1]) is OutputError
    assert all(str(ends[rank]).startswith("rank 1 failed: ") for rank in (0, 2))
    assert os.listdir(folder / "own") == os.listdir(folder / "shared") == []
    return str(ends[1])


def test_a_folder_that_is_another_one_on_some_rank_is_refused(tmp_path: Path) -> None:
    """If it failed, an output on a machine's own disk would be published with holes."""
    assert refusal_on_rank_1(tmp_path) == (
        f"{tmp_path / 'own' / 'a'}: the file that rank 0 created cannot be opened here: No such file or "
        "directory. Write to storage that all ranks share."
    )


@pytest.mark.parametrize("stale", [b"stale bytes", b""])
def test_another_file_under_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bytes
) -> None:
    """If it failed, a folder that is synchronised late would lose a rank's share."""
    open_existing = UnpublishedFile.open_existing

    def open_copy(file: UnpublishedFile) -> None:
        if file.target.parent.name == "own":
            file.readable_path.write_bytes(stale)
        open_existing(file)

    monkeypatch.setattr(UnpublishedFile, "open_existing", open_copy)
    assert refusal_on_rank_1(tmp_path) == (
        f"{tmp_path / 'own' / 'a'}: this rank sees another file than rank 0 is writing. Write to storage "
        "that all ranks share."
    )
