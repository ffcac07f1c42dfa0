"""The output path is absent, what it was, or complete: whatever is killed, interrupted, full or in the way."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from system.faults.outputs import (
    TIGHT,
    Averaging,
    begin,
    few_or,
    litter,
    make_averaging,
    naming,
    replacing,
    state,
    state_after,
    tmpfs,
)  # fmt: skip
from system.faults.runs import Ended, Runs

from ckpt_avg import OutputError, average


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Averaging:
    """Averaged in a few writes with 1 MiB of working memory."""
    return make_averaging(tmp_path_factory.mktemp("small"), 100_000)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Averaging:
    """8 checkpoints of 40 MB."""
    return make_averaging(tmp_path_factory.mktemp("large"), 10_000_000, count=8)


# -- kill -9 --------------------------------------------------------------------------------------------------------


def kill_everywhere(
    runs: Runs, run: Averaging, output: Path, *, overwrite: bool, **settings: object
) -> list[tuple[str, str, list[str], Ended]]:
    """Kills a run at each call that makes its output: (the call, state of the output, litter, end), in order."""
    ended = runs.run(*run.command(output, *TIGHT, *begin(output, overwrite)), record=True, **settings)
    assert ended.code == 0
    found = []
    for at, name in enumerate(ended.made):
        ended = runs.run(*run.command(output, *TIGHT, *begin(output, overwrite)), at=at, **settings)
        found.append((name, state(output, run.new), litter(output), ended))
        if found[-1][2]:  # what it left is gone after the next run
            assert runs.run(*run.command(output, *TIGHT, "--overwrite"), **settings).code == 0
            assert litter(output) == []
    return found


@pytest.mark.guarantee("all-or-nothing")
@pytest.mark.slow
@naming
@replacing
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_kill_at_any_system_call_leaves_the_old_output_or_the_new(
    runs: Runs, small: Averaging, output: Path, unnamed: bool, overwrite: bool, moment: str
) -> None:
    deaths = kill_everywhere(runs, small, output, overwrite=overwrite, moment=moment, unnamed=unnamed)
    if moment == "during":
        deaths = [death for death in deaths if death[0] == "pwrite"]
    assert len(deaths) >= (2 if moment == "during" else 6)
    before = "old" if overwrite else "absent"
    named = ("rename", "replace") if overwrite else ("link",)
    published = False
    for name, left, others, ended in deaths:
        assert ended.code == -signal.SIGKILL
        at_name = name in named
        published |= at_name and moment == "after"
        assert left == ("new" if published else before), f"killed {moment} {name}"
        if at_name:
            published = True
        if unnamed:
            # Only --overwrite needs a second name, for the moment between a link and a rename.
            between = overwrite and (name, moment) in (("link", "after"), ("replace", "before"), ("rename", "before"))
            assert len(others) == between, f"killed {moment} {name}: {others}"
        else:
            assert len(others) <= 1
        assert all(re.fullmatch(r"\.mean\.safetensors\.[0-9a-f]{6}\.[0-9a-f]{12}\.tmp", other) for other in others)


@pytest.mark.guarantee("durable")
@naming
@replacing
def test_bytes_are_synced_before_they_get_a_name_and_the_folder_after(
    runs: Runs, small: Averaging, output: Path, unnamed: bool, overwrite: bool
) -> None:
    """A power cut keeps what was synced: the data must be before the name refers to it, the name before success."""
    arguments = small.command(output, *TIGHT, *begin(output, overwrite))
    names = runs.run(*arguments, unnamed=unnamed, record=True).made
    last_write = max(index for index, name in enumerate(names) if name == "pwrite")
    assert names.index("posix_fallocate") < names.index("pwrite")
    publishing = ["link"] * (unnamed or not overwrite) + ["replace"] * overwrite
    assert names[last_write + 1 :] == ["fsync", *publishing, "fsync of the folder"]
    assert (state(output, small.new), litter(output)) == ("new", [])


@pytest.mark.slow
def test_kills_catch_a_writer_that_opens_the_output_itself(runs: Runs, small: Averaging, output: Path) -> None:
    """A control: killed at its system calls, a naive writer leaves partial files, and overwriting loses the old one."""
    run = Averaging(small.sources, small.sources[0].read_bytes())
    for overwrite in (False, True):
        deaths = kill_everywhere(runs, run, output, overwrite=overwrite, moment="during", wrong=("naive",))
        assert [left for _, left, _, _ in deaths].count("partial") >= 10


def kill_at_random(runs: Runs, run: Averaging, output: Path, kills: int, **settings: object) -> Counter[str]:
    """Kills runs at moments spread over their duration, until so many were killed; counts the states of the output.

    A run that is killed between the two system calls of --overwrite leaves a complete file under a hidden name.
    """
    durations = []
    for _ in range(3):
        ended = runs.run(*run.command(output, *begin(output, overwrite=False)), **settings)
        assert ended.code == 0
        durations.append(ended.seconds)
    rng = random.Random(kills)
    found: Counter[str] = Counter()
    while found["killed"] < kills and found["runs"] < 4 * kills:
        overwrite = found["runs"] % 2 == 1
        # In turn from tenths of the duration, so that no part of it is skipped.
        moment = (found["runs"] // 2 % 10 + rng.random()) / 10 * 1.05 * sorted(durations)[1]
        arguments = run.command(output, *begin(output, overwrite))
        ended = runs.run(*arguments, signalled=(signal.SIGKILL, moment), **settings)
        assert ended.code in (0, -signal.SIGKILL)
        left = state_after(output, run.new, overwrite)
        assert ended.code != 0 or left == "new"
        found[left] += 1
        found["runs"] += 1
        found["killed"] += ended.code != 0
        for name in litter(output):
            assert overwrite
            assert (output.parent / name).read_bytes() == run.new
            found["litter"] += 1
    assert found["killed"] >= kills
    print(found)
    return found


@pytest.mark.guarantee("all-or-nothing")
@pytest.mark.slow
@pytest.mark.parametrize("kills", few_or(1000, 40))
def test_a_kill_at_a_random_moment_leaves_the_old_output_or_the_new(
    runs: Runs, large: Averaging, output: Path, kills: int
) -> None:
    found = kill_at_random(runs, large, output, kills)
    assert (found["partial"], found["lost"]) == (0, 0), found
    assert found["litter"] <= max(1, kills // 100), found


@pytest.mark.slow
def test_random_kills_catch_a_writer_that_opens_the_output_itself(runs: Runs, large: Averaging, output: Path) -> None:
    """A control of the test above."""
    run = Averaging(large.sources, large.sources[0].read_bytes())
    found = kill_at_random(runs, run, output, 20, wrong=("naive",))
    assert found["partial"] + found["lost"] >= 3, found


# -- Signals --------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("signals")
@pytest.mark.slow
@naming
@replacing
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "before"),
        (signal.SIGTERM, "after"),
        (signal.SIGINT, "after"),
        (signal.SIGHUP, "after"),
    ],
)
def test_a_signal_at_any_system_call_leaves_no_litter(
    runs: Runs, small: Averaging, output: Path, unnamed: bool, overwrite: bool, number: int, moment: str
) -> None:
    ends = kill_everywhere(runs, small, output, overwrite=overwrite, moment=moment, number=number, unnamed=unnamed)
    assert len(ends) >= 6
    for name, left, others, ended in ends:
        assert left in ("new", "old" if overwrite else "absent"), f"{number} {moment} {name}"
        assert ended.code == 128 + number, f"{number} {moment} {name}: {ended.error}"
        assert others == [], f"{number} {moment} {name}"
        assert "Traceback" not in ended.error


def output_is_open(process: subprocess.Popen[str], folder: Path) -> bool:
    """Whether the process holds an unpublished file of the folder."""
    try:
        links = [os.readlink(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")]
    except OSError:
        return False
    return any(link.startswith(f"{folder}/") for link in links)


def torch_is_loading(process: subprocess.Popen[str], folder: Path) -> bool:
    """Whether the process has come to import torch."""
    try:
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.guarantee("signals")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("reached", "pause"), [(torch_is_loading, 0.0), (output_is_open, 0.0), (output_is_open, 0.05)],
    ids=["importing", "opened", "averaging"],
)  # fmt: skip
def test_a_signal_from_outside_ends_the_command_with_its_code(
    large: Averaging, output: Path, reached: Callable[[subprocess.Popen[str], Path], bool], pause: float
) -> None:
    """The whole command, as a user runs it, interrupted from another process."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    command = [sys.executable, "-m", "ckpt_avg", "average", *map(str, large.sources), *TIGHT, "-o"]
    # The native engine imports no torch.
    environment = os.environ | ({"CKPT_AVG_ENGINE": "torch"} if reached is torch_is_loading else {})
    processes = [
        subprocess.Popen(
            [*command, str(output.with_name(f"{number}.safetensors"))],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in numbers
    ]  # fmt: skip
    waiting = dict(zip(processes, numbers, strict=True))
    deadline = time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        for process in [process for process in waiting if reached(process, output.parent)]:
            time.sleep(pause)
            process.send_signal(waiting.pop(process))
        time.sleep(0.001)
    assert not waiting
    for process, number in zip(processes, numbers, strict=True):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 128 + number, error
        assert "Traceback" not in error
        assert "the output path is unchanged" in error
    assert os.listdir(output.parent) == []


# -- Racing runs ----------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("no-clobber")
@pytest.mark.slow
@pytest.mark.parametrize(("races", "count"), [(3, 10), pytest.param(20, 50, marks=pytest.mark.campaign)])
@naming
def test_of_racing_runs_exactly_one_succeeds(
    runs: Runs, small: Averaging, output: Path, unnamed: bool, races: int, count: int
) -> None:
    for _ in range(races):
        begin(output, overwrite=False)
        ends = runs.race(count, *small.command(output, *TIGHT), unnamed=unnamed)
        assert sorted(ended.code for ended in ends) == [0] + [5] * (count - 1), {ended.error for ended in ends}
        said = ("was created by something else during the run", "exists already")
        assert all(ended.code == 0 or any(fact in ended.error for fact in said) for ended in ends)
        assert (state(output, small.new), litter(output)) == ("new", [])


@pytest.mark.guarantee("no-clobber")
@pytest.mark.slow
@naming
def test_racing_runs_that_overwrite_leave_a_complete_output(
    runs: Runs, small: Averaging, output: Path, unnamed: bool
) -> None:
    ends = runs.race(10, *small.command(output, *TIGHT, *begin(output, overwrite=True)), unnamed=unnamed)
    assert [ended.code for ended in ends] == [0] * 10
    assert (state(output, small.new), litter(output)) == ("new", [])


@pytest.mark.guarantee("no-clobber")
@pytest.mark.slow
def test_a_race_catches_writers_that_all_believe_to_have_won(runs: Runs, small: Averaging, output: Path) -> None:
    """A control: if writers open the output themselves, all end with 0."""
    ends = runs.race(10, *small.command(output), wrong=("naive",))
    assert [ended.code for ended in ends].count(0) > 1


# -- Links, and what readers see ------------------------------------------------------------------------------------


@pytest.mark.guarantee("output-link")
def test_a_symbolic_link_is_followed(small: Averaging, output: Path, tmp_path: Path) -> None:
    """The file that it points to is written, in that file's folder, and the link stays."""
    link = tmp_path / "link"
    link.symlink_to("out/mean.safetensors")
    for overwrite in (False, True):
        average(small.sources, link, overwrite=overwrite)
        assert link.is_symlink()
        assert (state(output, small.new), litter(output)) == ("new", [])


# -- Full, read-only and limited file systems -----------------------------------------------------------------------


@pytest.mark.guarantee("disk-full")
@naming
@replacing
def test_a_full_disk_is_found_before_anything_is_read(
    small: Averaging, tmp_path: Path, unnamed: bool, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(
        "ckpt_avg.commands.publish.write_means", lambda *arguments, **options: pytest.fail("read the inputs")
    )
    with tmpfs(tmp_path / "full", "256k") as folder:
        output = folder / "mean.safetensors"
        begin(output, overwrite)
        with pytest.raises(
            OutputError, match=r"not enough space: it needs 391\.\d KiB, and 2\d\d\.\d KiB are free"
        ) as error:
            average(small.sources, output, overwrite=overwrite)
        assert error.value.exit_code == 5
        assert "Free some space or write elsewhere" in str(error.value)
        assert (state(output, small.new), litter(output)) == ("old" if overwrite else "absent", [])


@pytest.mark.guarantee("disk-full")
@naming
def test_a_disk_that_cannot_reserve_and_fills_up_leaves_nothing(
    small: Averaging, tmp_path: Path, unnamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr("ckpt_avg.files.platform.free_space", lambda folder: sys.maxsize)  # nor tell its space
    with tmpfs(tmp_path / "full", "256k") as folder:
        with pytest.raises(OutputError, match=r"mean\.safetensors: writing failed: No space left on device") as error:
            average(small.sources, folder / "mean.safetensors", memory=2**20)
        assert error.value.exit_code == 5
        assert os.listdir(folder) == []


def test_a_disk_with_just_enough_room_is_used(small: Averaging, tmp_path: Path) -> None:
    """The old output, the new one and nothing else fit."""
    with tmpfs(tmp_path / "tight", "840k") as folder:
        for overwrite in (False, True):
            average(small.sources, folder / "mean.safetensors", overwrite=overwrite)
            assert state(folder / "mean.safetensors", small.new) == "new"
        assert os.listdir(folder) == ["mean.safetensors"]


@pytest.mark.guarantee("read-only-folder")
def test_a_read_only_file_system_is_refused_before_anything_is_read(
    small: Averaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = "ckpt_avg.commands.prepare.open_selected"
    monkeypatch.setattr(opening, lambda *arguments, **options: pytest.fail("opened an input"))
    with tmpfs(tmp_path / "read-only", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OutputError, match=r"read-only is not writable\. Choose another path") as error:
            average(small.sources, folder / "mean.safetensors")
        assert error.value.exit_code == 5


@pytest.mark.guarantee("file-size-limit")
@pytest.mark.slow
@naming
def test_a_limit_on_file_sizes_is_an_error(runs: Runs, small: Averaging, output: Path, unnamed: bool) -> None:
    ended = runs.run(*small.command(output), file_size=100_000, unnamed=unnamed)
    assert ended.code == 5
    assert "reserving 391." in ended.error
    assert "File too large" in ended.error
    assert os.listdir(output.parent) == []
