"""Inputs that change, vanish or fail while the command reads them: exit 3 and no output, or what stood there before."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from system.faults.outputs import litter
from system.faults.runs import Ended, Runs

from ckpt_avg import average

InProcess = Callable[..., tuple[int, str, str]]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="windows are mapped on Linux alone")


@dataclass(frozen=True)
class Inputs:
    """Three checkpoints, the second of which will change.

    Attributes:
        sources: the files.
        before, after: the second one's bytes, and those of another checkpoint of the same size.
        old, new: the average's bytes with either.
    """

    sources: list[Path]
    before: bytes = field(repr=False)
    after: bytes = field(repr=False)
    old: bytes = field(repr=False)
    new: bytes = field(repr=False)

    def command(self, output: Path, *options: object) -> tuple[object, ...]:
        """Returns the arguments that average them."""
        return ("average", *self.sources, "-o", output, "-q", *options)

    @property
    def victim(self) -> Path:
        """The file that changes."""
        return self.sources[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Checkpoints of 8 MB, whose windows can be mapped."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = []
    for seed in range(4):
        paths.append(folder / f"{seed}.safetensors")
        save_file({"w": torch.rand(2_000_000, generator=torch.Generator().manual_seed(seed))}, paths[-1])
    contents = [paths[index].read_bytes() for index in (1, 3)]
    outputs = []
    for content in contents:
        paths[1].write_bytes(content)
        average(paths[:3], folder / "mean.safetensors", overwrite=True)
        outputs.append((folder / "mean.safetensors").read_bytes())
    paths[1].write_bytes(contents[0])
    return Inputs(paths[:3], *contents, *outputs)


# -- Changes at random moments --------------------------------------------------------------------------------------


def cut(inputs: Inputs, rng: random.Random) -> None:
    os.truncate(inputs.victim, rng.choice([0, len(inputs.before) // 2, len(inputs.before) - 100]))


def overwrite(inputs: Inputs, rng: random.Random) -> None:
    with inputs.victim.open("r+b") as file:
        file.write(inputs.after)


def append(inputs: Inputs, rng: random.Random) -> None:
    with inputs.victim.open("ab") as file:
        file.write(b"more")


def replace(inputs: Inputs, rng: random.Random) -> None:
    other = inputs.victim.with_name("other")
    other.write_bytes(inputs.after)
    os.replace(other, inputs.victim)


def delete(inputs: Inputs, rng: random.Random) -> None:
    inputs.victim.unlink()


Change = Callable[[Inputs, random.Random], None]
CHANGES: dict[str, Change] = {each.__name__: each for each in (cut, overwrite, append, replace, delete)}


def run_and_change(runs: Runs, inputs: Inputs, output: Path, *options: str, after: float, change: Change) -> Ended:
    """Averages, and changes an input meanwhile."""
    timer = threading.Timer(after, change, (inputs, random.Random(after)))
    timer.start()
    ended = runs.run(*inputs.command(output, *options))
    timer.join()
    return ended


def judge(inputs: Inputs, output: Path, ended: Ended, change: str) -> str:
    """Returns what became of a run: ``old`` or ``new`` output, ``refused``, ``absent``, or what must never be."""
    if ended.code == 0:
        contents = output.read_bytes()
        known = {inputs.old: "old"} | ({inputs.new: "new"} if change in ("overwrite", "replace") else {})
        return known.get(contents, "mixed output")
    if output.exists() or litter(output):
        return "litter"
    if "Traceback" in ended.error or str(inputs.victim) not in ended.error:
        return f"exit {ended.code}: {ended.error or 'no message'}"
    if ended.code == 2 and change == "delete":
        return "absent"  # it had not been looked at yet
    is_clear = re.search(r"changed while reading|missing|empty file|too many|(?i:no such file)", ended.error)
    return "refused" if ended.code == 3 and is_clear else f"exit {ended.code}: {ended.error}"


def change_at_random(runs: Runs, inputs: Inputs, output: Path, change: str, *options: str, times: int) -> Counter[str]:
    """Changes an input at moments spread over the duration of runs; counts what became of them."""

    def prepare() -> None:
        output.unlink(missing_ok=True)
        inputs.victim.write_bytes(inputs.before)

    durations = []
    for _ in range(3):
        prepare()
        ended = runs.run(*inputs.command(output, *options))
        assert (ended.code, output.read_bytes()) == (0, inputs.old)
        durations.append(ended.seconds)
    rng = random.Random(times)
    found: Counter[str] = Counter()
    for number in range(times):
        prepare()
        after = (number % 10 + rng.random()) / 10 * sorted(durations)[1]
        ended = run_and_change(runs, inputs, output, *options, after=after, change=CHANGES[change])
        found[judge(inputs, output, ended, change)] += 1
    prepare()
    return found


SAMPLE = {"cut": "pread"} | dict.fromkeys(("overwrite", "append", "replace", "delete"), "mmap")
MANY = [(change, io, 200) for change in CHANGES for io in ("mmap", "pread")]


@pytest.mark.guarantee("changing-inputs")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "io", "times"),
    [*((*each, 10) for each in SAMPLE.items()), *(pytest.param(*each, marks=pytest.mark.campaign) for each in MANY)],
)
def test_an_input_that_changes_at_any_moment_never_reaches_the_output_in_part(
    runs: Runs, inputs: Inputs, output: Path, change: str, io: str, times: int
) -> None:
    """If it failed, an average of halves of two checkpoints would be published, or a crash would say nothing."""
    found = change_at_random(runs, inputs, output, change, "--io", io, times=times)
    print(change, io, dict(found))
    assert found.keys() <= {"old", "new", "refused", "absent"}, found
    assert change != "replace" or "refused" not in found, found
    assert times < 200 or change in ("replace", "delete") or found["refused"] >= 20, found


@pytest.mark.guarantee("changing-inputs")
@pytest.mark.slow
def test_changes_catch_a_reader_that_does_not_look_again(runs: Runs, inputs: Inputs, output: Path) -> None:
    """A control: without the look at the end, a file that was overwritten meanwhile gives an output of both."""
    found = []
    for wrong in (("overwriting_an_input",), ("overwriting_an_input", "not_looking_again")):
        output.unlink(missing_ok=True)
        try:
            ended = runs.run(*inputs.command(output, "--io", "pread"), wrong=wrong)
        finally:
            inputs.victim.write_bytes(inputs.before)
        found.append(judge(inputs, output, ended, "overwrite"))
    assert found == ["refused", "mixed output"]


@pytest.mark.guarantee("changing-inputs")
@pytest.mark.slow
@linux
def test_a_file_that_is_cut_while_its_mapping_is_in_use_is_an_error(runs: Runs, inputs: Inputs, output: Path) -> None:
    """If it failed, the process would die of SIGBUS: no message, no cause, and an exit code that no script knows."""
    try:
        ended = runs.run(*inputs.command(output, "--io", "mmap"), wrong=("cutting_an_input",))
    finally:
        inputs.victim.write_bytes(inputs.before)
    assert os.listdir(output.parent) == []
    assert ended.code == 3, ended
    assert f"{inputs.victim}: changed while reading" in ended.error


# -- Disks that fail, and file systems without maps -----------------------------------------------------------------


@pytest.fixture
def fail_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets tensors, not headers, fail to be read from the fifth read on."""

    def fail(code: int) -> None:
        calls: list[int] = []
        preadv = os.preadv

        def fails() -> bool:
            calls.append(1)
            return len(calls) > 4 and threading.current_thread().name.startswith("worker")

        def read(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            if not flags and fails():  # with flags it is a hint to the system
                raise OSError(code, os.strerror(code))
            return preadv(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setenv("CKPT_AVG_ENGINE", "torch")  # the native engine makes its own calls

    return fail


@pytest.mark.guarantee("read-errors")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_in_the_middle_is_an_error_that_names_file_and_place(
    in_process: InProcess, inputs: Inputs, output: Path, code: int, fail_reads: Callable[[int], None]
) -> None:
    """If it failed, a bad block or a stale handle would give zeros in the output, or a traceback."""
    fail_reads(code)
    output.write_bytes(b"the old one")
    ended, out, err = in_process("average", *inputs.sources, "-o", output, "-q", "--overwrite")
    assert (ended, out) == (3, "")
    named = re.escape(str(inputs.victim.parent))
    assert re.search(
        rf"Error: {named}/\d\.safetensors: reading at byte [\d,]+ failed: {os.strerror(code)}\. Check the disk\.", err
    )
    assert "Traceback" not in err
    assert (litter(output), output.read_bytes()) == ([], b"the old one")


@pytest.mark.guarantee("sparse-inputs")
def test_a_file_with_holes_gives_the_average_of_a_full_one(in_process: InProcess, output: Path, tmp_path: Path) -> None:
    """If it failed, checkpoints copied with `cp --sparse` would be averaged as something else."""
    values = torch.zeros(3_000_000)
    values[::1_000_000] = 5.0
    save_file({"w": values}, tmp_path / "full.safetensors")
    save_file({"w": values + 1}, tmp_path / "other.safetensors")
    subprocess.run(["cp", "--sparse=always", tmp_path / "full.safetensors", tmp_path / "holes.safetensors"], check=True)
    made = []
    for first in ("full", "holes"):
        (tmp_path / first).mkdir()
        os.rename(tmp_path / f"{first}.safetensors", tmp_path / first / "first.safetensors")
        sources = [tmp_path / first / "first.safetensors", tmp_path / "other.safetensors"]
        assert in_process("average", *sources, "-o", output, "--overwrite")[0] == 0
        made.append(output.read_bytes())
    assert (tmp_path / "holes" / "first.safetensors").stat().st_blocks * 512 < 1_000_000
    assert made[0] == made[1]


# -- Limits on open files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """12 checkpoints of 12 shards."""
    run = tmp_path_factory.mktemp("shards")
    folders = []
    for step in range(12):
        folders.append(run / f"checkpoint-{step}")
        folders[-1].mkdir()
        names = [f"model-{number + 1:05}-of-00012.safetensors" for number in range(12)]
        for number, name in enumerate(names):
            save_file({f"w{number}": torch.full((100,), float(step * number))}, folders[-1] / name)
        index = ", ".join(f'"w{number}": "{name}"' for number, name in enumerate(names))
        (folders[-1] / "model.safetensors.index.json").write_text(f'{{"metadata": {{}}, "weight_map": {{{index}}}}}')
    return folders


def with_descriptors(count: int) -> Callable[[], None]:
    """Returns what limits a new process to so many open files."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


@pytest.mark.guarantee("open-files")
@pytest.mark.slow
def test_more_files_than_may_be_open_is_exit_6(ckpt_avg: Command, shards: list[Path], output: Path) -> None:
    """If it failed, the user would get a traceback, or not learn how many files the checkpoints have."""
    ended = ckpt_avg("average", *shards, "-o", output, "-q", preexec_fn=with_descriptors(80))
    assert ended.returncode == 6, ended
    assert ended.stderr == (
        "Error: 12 checkpoints: at least 144 files have to be open at once, but the limit is 80. Allow more with "
        "`ulimit -n 244` (as root), or average fewer checkpoints.\n"
    )
    assert os.listdir(output.parent) == []


@pytest.mark.slow
def test_the_ulimit_that_the_message_names_is_enough(ckpt_avg: Command, shards: list[Path], output: Path) -> None:
    """A soft limit below it is raised, and the user need not do that."""
    raised = ckpt_avg(
        "average", *shards, "-o", output, "-q",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 244)),
    )  # fmt: skip
    assert (raised.returncode, raised.stderr) == (0, "")
    average(shards, output.with_name("without a limit"))
    assert output.read_bytes() == output.with_name("without a limit").read_bytes()


@pytest.mark.guarantee("open-files")
@pytest.mark.slow
def test_too_few_descriptors_for_anything_is_an_error(ckpt_avg: Command, shards: list[Path], output: Path) -> None:
    """If it failed, the user would get a traceback, and not the limit that is in the way."""
    ended = ckpt_avg("average", *shards, "-o", output, "-q", preexec_fn=with_descriptors(6))
    assert ended.returncode in (3, 5, 6), ended  # the folder, the output or a checkpoint could not be opened
    assert ended.stderr.startswith("Error: ")
    assert "too many open files" in ended.stderr.lower() or "but the limit is 6" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert os.listdir(output.parent) == []
