"""An output folder is absent, what it was, or complete: whatever call kills the run, fails, or is interrupted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from system.faults.outputs import few_or, naming, replacing, tmpfs
from system.faults.rank_runs import in_threads
from system.faults.runs import Ended, Runs
from system.faults.test_power_cut import Disk
from system.faults.tracing import CHANGES, OPENS, WRITING, Call

from ckpt_avg import OutputError, average
from ckpt_avg.errors import RequirementError

HIDDEN = re.compile(r"\.release\.[0-9a-f]{6}\.[0-9a-f]{12}\.tmp")
TRACED = ("-y", "-s", "0", "-e", "trace=poll,?" + ",?".join([*OPENS, *CHANGES, "fsync"]))
ERRORS = ("EIO", "ENOSPC", "EACCES")
PUBLISHED = "written, but syncing its folder failed"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Releases:
    """Checkpoint folders, the output folder that they make, and an older one in another folder.

    Attributes:
        base: of all of them.
        runs: that fork the command.
        unnamed, overwrite: as in `Runs` and the command.
    """

    base: Path
    runs: Runs
    unnamed: bool = True
    overwrite: bool = False
    new: dict[str, bytes] = field(default_factory=dict)
    old: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for step in (1, 2, 3):
            folder = self.base / "run" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            generator = torch.Generator().manual_seed(step)
            save_file({"w": torch.rand(50_000, generator=generator)}, folder / "model.safetensors")
            (folder / "config.json").write_text('{"model_type": "bert", "dtype": "float32"}')
            (folder / "tokenizer.json").write_text("{}" + " " * 3_000_000)
        average(self.base / "run", f"{self.base}/new/release/", sha256=True)
        average(self.base / "run", f"{self.base}/old/release/", last=2)
        self.new, self.old = contents(self.base / "new" / "release"), contents(self.base / "old" / "release")
        self.target.parent.mkdir()
        self.run()  # what it imports is imported from now on

    @property
    def target(self) -> Path:
        """The output folder."""
        return self.base / "out" / "release"

    def begin(self) -> None:
        """Empties the folder around the output, or leaves the older output alone in it."""
        shutil.rmtree(self.target.parent)
        self.target.parent.mkdir()
        if self.overwrite:
            shutil.copytree(self.base / "old" / "release", self.target)

    def command(self, target: Path | None = None) -> tuple[object, ...]:
        options = ["--overwrite"] if self.overwrite else []
        return (
            "average",
            self.base / "run",
            "-o",
            f"{target or self.target}/",
            "--sha256",
            "-q",
            "--threads",
            "1",
            *options,
        )

    def run(self, **options: object) -> Ended:
        self.begin()
        return self.runs.run(*self.command(), unnamed=self.unnamed, learn=not options, **options)

    @property
    def left(self) -> str:
        """What is at the output's path: ``absent``, ``old``, ``new``, or ``partial`` for anything else."""
        if not self.target.exists():
            return "absent"
        found = contents(self.target)
        return "new" if found == self.new else "old" if found == self.old else "partial"

    @property
    def before(self) -> str:
        return "old" if self.overwrite else "absent"

    @property
    def litter(self) -> list[str]:
        return sorted(set(os.listdir(self.target.parent)) - {"release"})

    def calls(self) -> list[tuple[str, int]]:
        """The system calls of the main thread that change the folder around the output: name and number."""
        ended = self.run(strace=TRACED)
        assert (ended.code, self.left, self.litter) == (0, "new", []), ended.error
        numbers: Counter[str] = Counter()
        found = []
        for call in ended.calls:
            numbers[call.name] += 1
            if self._changes(call):
                found.append((call.name, numbers[call.name]))
        return found

    def _changes(self, call: Call) -> bool:
        names = f"{self.target.parent}" in call.text
        return names and (call.name not in OPENS or bool(WRITING.search(call.text)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, runs: Runs) -> Releases:
    return Releases(tmp_path_factory.mktemp("releases"), runs)


@pytest.fixture
def releases(made: Releases, unnamed: bool, overwrite: bool) -> Iterator[Releases]:
    made.unnamed, made.overwrite = unnamed, overwrite
    yield made
    made.unnamed, made.overwrite = True, False


def spread(calls: list[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """So many of the calls, from all parts, the last ones among them: there the folder gets its name."""
    middle = calls[: -most // 2]
    return [*middle[:: max(1, 2 * len(middle) // most)], *calls[-most // 2 :]]


@pytest.mark.guarantee("all-or-nothing")
@pytest.mark.slow
@pytest.mark.parametrize("most", few_or(1000, 12))
@naming
@replacing
def test_a_kill_at_any_system_call_leaves_the_old_folder_or_the_new(releases: Releases, most: int) -> None:
    """And the next run removes whatever else is left."""
    found: Counter[str] = Counter()
    for name, number in spread(releases.calls(), most):
        ended = releases.run(strace=("-e", f"trace=poll,{name}", "-e", f"inject={name}:signal=KILL:when={number}"))
        left = releases.left
        assert left in (releases.before, "new"), f"killed at {name} {number}: {left}"
        assert ended.code in (0, -signal.SIGKILL)
        assert all(map(HIDDEN.fullmatch, releases.litter)), releases.litter
        assert len(releases.litter) <= 1
        found[left] += 1
        if releases.litter:
            again = releases.runs.run(*releases.command(), *([] if releases.overwrite else ["--overwrite"]))
            assert (again.code, releases.left, releases.litter) == (0, "new", []), again.error
            found["removed"] += 1
    print(found)
    assert found[releases.before] >= 4
    assert found["new"] >= 1
    assert found["removed"] >= 4


@pytest.mark.guarantee("system-calls")
@pytest.mark.slow
@pytest.mark.parametrize("most", few_or(1000, 12))
@naming
@replacing
def test_a_failed_system_call_leaves_the_old_folder_or_the_new(releases: Releases, most: int) -> None:
    complaints = []
    struck = 0
    for index, (name, number) in enumerate(spread(releases.calls(), most)):
        for error in ERRORS if most == 1000 else [ERRORS[index % len(ERRORS)]]:
            strace = ("-e", f"trace=poll,{name}", "-e", f"inject={name}:error={error}:when={number}")
            ended = releases.run(strace=strace)
            struck += any(call.is_injected for call in ended.calls)
            left = releases.left
            is_clean = ended.code == 5 and "Error: " in ended.error and "Traceback" not in ended.error
            expected = "new" if ended.code == 0 or PUBLISHED in ended.error else releases.before
            # What could not be removed stays, under its hidden name: then the removal is what failed.
            can_remove = name not in ("unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2", "openat")
            if left != expected or not (ended.code == 0 or is_clean) or (releases.litter and can_remove):
                complaints.append(
                    f"{error} of {name} {number}: {ended.code}, {left}, {releases.litter}: {ended.error[-300:]}"
                )
    assert complaints == []
    assert struck >= 10


@pytest.mark.guarantee("signals")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "unnamed", "overwrite"),
    [
        (signal.SIGTERM, "before", True, False),
        (signal.SIGTERM, "before", False, True),
        (signal.SIGINT, "after", False, False),
        (signal.SIGINT, "after", True, True),
    ],
)
def test_a_signal_at_any_call_leaves_no_litter(releases: Releases, number: int, moment: str) -> None:
    made = releases.run(record=True).made
    found: Counter[str] = Counter()
    for at, name in enumerate(made):
        ended = releases.run(at=at, moment=moment, number=number)
        assert releases.left in (releases.before, "new"), f"{moment} {name} {at}"
        is_missed = ended.code == 0 and (moment, name) == ("after", "rename")  # that of nothing, which fails
        assert is_missed or ended.code == 128 + number, f"{moment} {name} {at}: {ended.error}"
        assert releases.litter == [], f"{moment} {name} {at}"
        assert "Traceback" not in ended.error
        found[releases.left] += 1
    assert found[releases.before] >= 10


@pytest.mark.guarantee("no-clobber")
@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_racing_runs_one_folder_is_published(made: Releases, runs: Runs, overwrite: bool) -> None:
    made.begin()
    arguments = [*made.command(), *(["--overwrite"] if overwrite else [])]
    ends = runs.race(8, *arguments)
    codes = sorted(ended.code for ended in ends)
    assert codes == ([0] * 8 if overwrite else [0] + [5] * 7), {ended.error for ended in ends}
    assert (made.left, made.litter) == ("new", [])


@pytest.mark.guarantee("durable")
@pytest.mark.slow
@pytest.mark.parametrize("cuts", few_or(50, 4))
def test_a_folder_is_complete_after_a_power_cut(made: Releases, tmp_path: Path, cuts: int) -> None:
    with tmpfs(tmp_path / "memory", "60m") as place:
        disk = Disk(place)
        disk.format()
        target = disk.folder / "release"
        try:
            for cut in range(cuts):
                made.overwrite = cut % 2 == 1
                shutil.rmtree(target, ignore_errors=True)
                if made.overwrite:
                    shutil.copytree(made.base / "old" / "release", target)
                subprocess.run(["sync", "-f", str(disk.folder)], check=True)
                ended = made.runs.run(*made.command(target))
                disk.cut()
                assert ended.code == 0, ended.error
                disk.restart()
                assert contents(target) == made.new
                assert set(os.listdir(disk.folder)) - {"lost+found"} <= {
                    "release",
                    *filter(HIDDEN.fullmatch, os.listdir(disk.folder)),
                }
        finally:
            made.overwrite = False
            disk.unmount()


@pytest.mark.guarantee("disk-full")
@pytest.mark.parametrize(("room", "file"), [("3000k", "model.safetensors"), ("1m", "tokenizer.json")])
def test_a_disk_without_room_for_the_folder_keeps_nothing_of_it(
    made: Releases, tmp_path: Path, room: str, file: str
) -> None:
    said = re.escape(f"release/{file}: not enough space")
    with tmpfs(tmp_path / "full", room) as folder:
        with pytest.raises(OutputError, match=said) as error:
            average(made.base / "run", f"{folder}/release/")
        assert error.value.exit_code == 5
        assert os.listdir(folder) == []


@pytest.mark.guarantee("read-only-folder")
def test_a_read_only_file_system_is_refused_at_once(made: Releases, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "read-only", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OutputError, match="is not writable"):
            average(made.base / "run", f"{folder}/release/")


@pytest.mark.guarantee("all-or-nothing")
def test_a_failed_requirement_publishes_no_folder_and_keeps_the_old_one(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"weight": torch.full((1, 2), float(step))}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    options = {"model": lambda: torch.nn.Linear(2, 1, bias=False), "evaluate": lambda model: {"metric": 0.0}}
    target = tmp_path / "out" / "release"
    average(tmp_path, f"{target}/", **options)
    before = contents(target)
    with pytest.raises(RequirementError):
        average(tmp_path, f"{target}/", require="metric>=1", overwrite=True, last=1, **options)
    assert contents(target) == before
    with pytest.raises(RequirementError):
        average(tmp_path, f"{tmp_path}/out/other/", require="metric>=1", **options)
    assert os.listdir(target.parent) == ["release"]


def test_several_ranks_write_the_folder_that_one_process_writes(made: Releases) -> None:
    made.begin()
    alone = average(made.base / "run", f"{made.base}/alone/release/")
    ends = in_threads(2, lambda ranks: average(made.base / "run", f"{made.target}/", ranks=ranks))
    assert [ended.files for ended in ends] == [alone.files] * 2
    assert contents(made.target) == contents(alone.output)
    assert made.litter == []
