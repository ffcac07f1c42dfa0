"""Exit 0 means durable: after a power cut the output is complete; a cut during a run leaves no part of it.

The output is on an ext4 file system of its own, which is shut down as if the power failed: what was not written to
its device by then is lost. The next mount replays the journal. (What a device itself may lose is not shown.)
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from system.faults.forked_runs import Ended, Runs
from system.faults.harness import state, tmpfs
from system.faults.tracing import refuse_or_skip

from ckpt_avg import average

pytestmark = pytest.mark.slow

FS_IOC_SHUTDOWN = 0x8004587D
WITHOUT_LOG_FLUSH = 2
ELEMENTS = 250_000
OLD = b"the old output" * 1500
TIGHT = ("-q", "--memory", "1MiB", "--threads", "1")
naming = pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "hidden name"])


class Disk:
    """A file system in a file, whose power can be cut.

    Args:
        place: a folder for both the file and the place where it is mounted.
    """

    def __init__(self, place: Path) -> None:
        self._image = place / "disk"
        self.folder = place / "mounted"

    def format(self) -> None:
        """Makes the file system; the test is skipped where it cannot be mounted."""
        with self._image.open("wb") as file:
            file.truncate(32 * 2**20)
        self.folder.mkdir()
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", str(self._image)], check=True, capture_output=True, text=True)
            self.mount()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            refuse_or_skip("mount", f"needs an ext4 file system of its own: {getattr(error, 'stderr', error)}")

    def mount(self) -> None:
        """Makes its files visible; the journal is replayed. Nothing is written by itself for minutes."""
        command = ["mount", "-o", "loop,commit=600", str(self._image), str(self.folder)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def unmount(self) -> None:
        """Lets go of it."""
        subprocess.run(["umount", str(self.folder)], check=True)

    def cut(self) -> None:
        """Ends all writing at once. What is asked of the file system from now on fails."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def restart(self) -> None:
        """What happens when the power is back."""
        self.unmount()
        self.mount()

    def begin(self, output: Path, *, overwrite: bool) -> tuple[str, ...]:
        """Empties it, or leaves an old output alone in it, durably; returns the options that a run needs."""
        for path in self.folder.iterdir():
            if path.name != "lost+found":
                path.unlink()
        if overwrite:
            output.write_bytes(OLD)
        subprocess.run(["sync", "-f", str(self.folder)], check=True)
        return ("--overwrite",) if overwrite else ()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints, elsewhere."""
    folder = tmp_path_factory.mktemp("sources")
    paths = [folder / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        save_file({"w": torch.rand(ELEMENTS, generator=generator), "b": torch.ones(5)}, path)
    return paths


@pytest.fixture(scope="module")
def new(sources: list[Path]) -> bytes:
    """The bytes of their average."""
    output = sources[0].with_name("mean.safetensors")
    average(sources, output)
    return output.read_bytes()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own, in memory."""
    with tmpfs(tmp_path / "memory", "40m") as place:
        made = Disk(place)
        made.format()
        yield made
        made.unmount()


def cut_after_success(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, cuts: int, *, unnamed: bool, wrong: tuple[str, ...] = ()
) -> Counter[str]:
    """Cuts the power as soon as a run has ended with 0, so many times; counts what is found afterwards."""
    output = disk.folder / "mean.safetensors"
    found: Counter[str] = Counter()
    for index in range(cuts):
        options = disk.begin(output, overwrite=index % 2 == 1)
        ended = runs.run("average", *sources, "-o", output, *TIGHT, *options, unnamed=unnamed, wrong=wrong)
        disk.cut()
        assert ended.code == 0, ended.error
        disk.restart()
        found[state(output, new, OLD)] += 1
    return found


def assert_readable(output: Path) -> None:
    """By the reader of safetensors."""
    with safe_open(str(output), framework="pt") as reader:
        assert reader.get_tensor("w").shape == (ELEMENTS,)
        assert bool(reader.get_tensor("w").isfinite().all())


@pytest.mark.guarantee("durable")
@naming
def test_what_succeeded_is_there_after_a_power_cut(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, unnamed: bool
) -> None:
    assert cut_after_success(disk, runs, sources, new, 3, unnamed=unnamed) == {"new": 3}
    assert_readable(disk.folder / "mean.safetensors")


@pytest.mark.guarantee("durable")
@pytest.mark.campaign
@naming
def test_what_succeeded_is_there_after_many_power_cuts(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, unnamed: bool
) -> None:
    found = cut_after_success(disk, runs, sources, new, 100, unnamed=unnamed)
    print(found)
    assert found == {"new": 100}
    assert_readable(disk.folder / "mean.safetensors")


@pytest.mark.parametrize(
    ("wrong", "loses"),
    [("without_fsync_of_the_file", "partial"), ("without_fsync_of_the_folder", "absent")],
)
def test_power_cuts_catch_a_writer_that_leaves_out_a_sync(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, wrong: str, loses: str
) -> None:
    """A control: exit 0, and the bytes or the name are lost."""
    found = cut_after_success(disk, runs, sources, new, 2, unnamed=True, wrong=(wrong,))
    assert found["new"] == 0, found
    assert found[loses] >= 1, found


def cut_during(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, cuts: int, *, unnamed: bool, wrong: tuple[str, ...] = ()
) -> tuple[Counter[str], list[Ended]]:
    """Cuts the power at moments spread over a run; counts what is found afterwards, and returns how runs ended."""
    output = disk.folder / "mean.safetensors"
    rng = random.Random(cuts)
    wrong = (*wrong, "writing_slowly")
    disk.begin(output, overwrite=False)
    usual = runs.run("average", *sources, "-o", output, *TIGHT, unnamed=unnamed, wrong=wrong).seconds
    found: Counter[str] = Counter()
    ends = []
    for index in range(cuts):
        overwrite = index % 2 == 1
        options = disk.begin(output, overwrite=overwrite)
        timer = threading.Timer((index + rng.random()) / cuts * 1.1 * usual, disk.cut)
        timer.start()
        ended = runs.run("average", *sources, "-o", output, *TIGHT, *options, unnamed=unnamed, wrong=wrong)
        timer.join()
        disk.restart()
        left = state(output, new, OLD)
        found["lost" if left == "absent" and overwrite else left] += 1
        found["success"] += ended.code == 0
        found["success, and not there"] += ended.code == 0 and left != "new"
        ends.append(ended)
    return found, ends


def assert_old_or_new(found: Counter[str], ends: list[Ended]) -> None:
    assert (found["partial"], found["lost"], found["success, and not there"]) == (0, 0, 0), found
    for ended in ends:
        assert ended.code in (0, 5), ended.error
        assert "Traceback" not in ended.error


@naming
def test_a_power_cut_during_a_run_leaves_the_old_output_or_the_new(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, unnamed: bool
) -> None:
    """And the run, which sees its disk fail, ends with exit 5."""
    found, ends = cut_during(disk, runs, sources, new, 5, unnamed=unnamed)
    assert_old_or_new(found, ends)
    assert found["absent"] + found["old"] >= 1, found


@pytest.mark.guarantee("durable")
@pytest.mark.campaign
@naming
def test_many_power_cuts_during_runs_leave_the_old_output_or_the_new(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes, unnamed: bool
) -> None:
    found, ends = cut_during(disk, runs, sources, new, 100, unnamed=unnamed)
    print(found, Counter(ended.code for ended in ends))
    assert_old_or_new(found, ends)
    assert found["absent"] + found["old"] >= 30, found


def test_power_cuts_during_runs_catch_a_writer_that_opens_the_output_itself(
    disk: Disk, runs: Runs, sources: list[Path], new: bytes
) -> None:
    """A control: what it overwrote is lost, and a part may be left."""
    found, _ = cut_during(disk, runs, sources, new, 6, unnamed=True, wrong=("in_place",))
    assert found["partial"] + found["lost"] >= 1, found
