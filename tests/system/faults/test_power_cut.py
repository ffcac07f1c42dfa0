"""Exit 0 means durable: after a power cut the output is complete; a cut during a run leaves no part of it.

The output is on an ext4 file system of its own, which is shut down as if the power failed: what was not written to
its device by then is lost. The next mount replays the journal. (What a device itself may lose is not shown.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from system.faults.outputs import TIGHT, Averaging, begin, few_or, make_averaging, naming, state, state_after, tmpfs
from system.faults.runs import Ended, Runs
from system.faults.tracing import refuse_or_skip

from ckpt_avg import OutputError, average
from ckpt_avg.files import platform
from ckpt_avg.text import size

pytestmark = pytest.mark.slow

FS_IOC_SHUTDOWN = 0x8004587D
WITHOUT_LOG_FLUSH = 2
ELEMENTS = 250_000


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
        options = begin(output, overwrite)
        subprocess.run(["sync", "-f", str(self.folder)], check=True)
        return options


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Averaging:
    """Three checkpoints, elsewhere."""
    return make_averaging(tmp_path_factory.mktemp("sources"), ELEMENTS)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own, in memory."""
    with tmpfs(tmp_path / "memory", "40m") as place:
        made = Disk(place)
        made.format()
        yield made
        made.unmount()


def cut_after_success(
    disk: Disk, runs: Runs, run: Averaging, cuts: int, *, unnamed: bool, wrong: tuple[str, ...] = ()
) -> Counter[str]:
    """Cuts the power as soon as a run has ended with 0, so many times; counts what is found afterwards."""
    output = disk.folder / "mean.safetensors"
    found: Counter[str] = Counter()
    for index in range(cuts):
        options = disk.begin(output, overwrite=index % 2 == 1)
        ended = runs.run(*run.command(output, *TIGHT, *options), unnamed=unnamed, wrong=wrong)
        disk.cut()
        assert ended.code == 0, ended.error
        disk.restart()
        found[state(output, run.new)] += 1
    return found


@pytest.mark.guarantee("durable")
@pytest.mark.parametrize("cuts", few_or(100, 3))
@naming
def test_what_succeeded_is_there_after_a_power_cut(
    disk: Disk, runs: Runs, run: Averaging, cuts: int, unnamed: bool
) -> None:
    assert cut_after_success(disk, runs, run, cuts, unnamed=unnamed) == {"new": cuts}
    with safe_open(str(disk.folder / "mean.safetensors"), framework="pt") as reader:
        assert reader.get_tensor("w").shape == (ELEMENTS,)
        assert bool(reader.get_tensor("w").isfinite().all())


@pytest.mark.parametrize(
    ("wrong", "loses"),
    [("without_fsync_of_the_file", "partial"), ("without_fsync_of_the_folder", "absent")],
)
def test_power_cuts_catch_a_writer_that_leaves_out_a_sync(
    disk: Disk, runs: Runs, run: Averaging, wrong: str, loses: str
) -> None:
    """A control: exit 0, and the bytes or the name are lost."""
    found = cut_after_success(disk, runs, run, 2, unnamed=True, wrong=(wrong,))
    assert found["new"] == 0, found
    assert found[loses] >= 1, found


@pytest.mark.guarantee("disk-full")
@pytest.mark.parametrize("tells", [True, False], ids=["before", "while it is reserved"])
def test_an_output_that_does_not_fit_on_ext4_takes_nothing_from_others(
    disk: Disk, run: Averaging, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 reserves every free block before it fails: they must be free again, and the message must say how many."""
    with (disk.folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(2**16))
    os.truncate(disk.folder / "ballast", (disk.folder / "ballast").stat().st_size - 100_000)
    space = os.statvfs(disk.folder)
    if not tells:
        lies, real = [sys.maxsize], platform.free_space
        monkeypatch.setattr(platform, "free_space", lambda folder: lies.pop() if lies else real(folder))
    free = size(space.f_bfree * space.f_frsize)
    with pytest.raises(OutputError, match=rf"not enough space: it needs 97.* KiB, and {free} are free") as error:
        average(run.sources, disk.folder / "mean.safetensors")
    assert error.value.exit_code == 5
    assert os.statvfs(disk.folder).f_bfree == space.f_bfree > 0
    assert sorted(os.listdir(disk.folder)) == ["ballast", "lost+found"]


def cut_during(
    disk: Disk, runs: Runs, run: Averaging, cuts: int, *, unnamed: bool, wrong: tuple[str, ...] = ()
) -> tuple[Counter[str], list[Ended]]:
    """Cuts the power at moments spread over a run; counts what is found afterwards, and returns how runs ended."""
    output = disk.folder / "mean.safetensors"
    rng = random.Random(cuts)
    wrong = (*wrong, "writing_slowly")
    disk.begin(output, overwrite=False)
    usual = runs.run(*run.command(output, *TIGHT), unnamed=unnamed, wrong=wrong).seconds
    found: Counter[str] = Counter()
    ends = []
    for index in range(cuts):
        overwrite = index % 2 == 1
        options = disk.begin(output, overwrite=overwrite)
        timer = threading.Timer((index + rng.random()) / cuts * 1.1 * usual, disk.cut)
        timer.start()
        ended = runs.run(*run.command(output, *TIGHT, *options), unnamed=unnamed, wrong=wrong)
        timer.join()
        disk.restart()
        left = state_after(output, run.new, overwrite)
        found[left] += 1
        found["success"] += ended.code == 0
        found["success, and not there"] += ended.code == 0 and left != "new"
        ends.append(ended)
    return found, ends


@pytest.mark.guarantee("durable")
@pytest.mark.parametrize("cuts", few_or(100, 5))
@naming
def test_a_power_cut_during_a_run_leaves_the_old_output_or_the_new(
    disk: Disk, runs: Runs, run: Averaging, cuts: int, unnamed: bool
) -> None:
    """And the run, which sees its disk fail, ends with exit 5."""
    found, ends = cut_during(disk, runs, run, cuts, unnamed=unnamed)
    print(found, Counter(ended.code for ended in ends))
    assert (found["partial"], found["lost"], found["success, and not there"]) == (0, 0, 0), found
    for ended in ends:
        assert ended.code in (0, 5), ended.error
        assert "Traceback" not in ended.error
    assert found["absent"] + found["old"] >= (1 if cuts < 100 else 30), found


def test_power_cuts_during_runs_catch_a_writer_that_opens_the_output_itself(
    disk: Disk, runs: Runs, run: Averaging
) -> None:
    """A control: what it overwrote is lost, and a part may be left."""
    found, _ = cut_during(disk, runs, run, 6, unnamed=True, wrong=("in_place",))
    assert found["partial"] + found["lost"] >= 1, found
