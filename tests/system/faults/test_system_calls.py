"""A system call that fails is a clean error: a known exit code, a message, and nothing partial in the output's folder.

strace lets one call fail in each run: every call that the command makes, of those that can fail in practice, in the
main thread and in the one that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from system.faults.outputs import Averaging, begin, litter, make_averaging, state
from system.faults.runs import Ended, Runs
from system.faults.tracing import Call

pytestmark = pytest.mark.slow

# Names differ between architectures and C libraries; those that a run does not make are skipped.
OPENS = ("open", "openat")
CALLS = (
    *OPENS, "close", "fcntl", "access", "stat", "lstat", "fstat", "newfstatat", "statx", "statfs", "fstatfs",
    "readlink", "getdents64", "mmap", "madvise", "read", "pread64", "preadv", "preadv2", "fadvise64", "write",
    "pwrite64", "fallocate", "ftruncate", "sync_file_range", "fsync", "link", "linkat", "rename", "renameat",
    "renameat2",
)  # fmt: skip
LOOKS = ("stat", "lstat", "newfstatat", "statx", "access", "readlink")
ERRORS = ("EIO", "ENOSPC", "EACCES", "EINTR")
CLEAN = (2, 3, 5, 6)  # exit codes that may follow: a call failed, so the checkpoints cannot be to blame (4)
# What a message says of a failure after the output had its name.
PUBLISHED = ("written, but syncing its folder failed", "stdout: cannot be written")
# How the output comes about: with a name or without until it is published, and over an old one or not.
WAYS = [(True, False), (True, True), (False, False), (False, True)]
MAIN, WORKER = 0, 1


@dataclass(frozen=True)
class Fault:
    """The n-th call of a name, in a thread, fails with an error."""

    thread: int
    name: str
    number: int
    error: str

    @property
    def options(self) -> tuple[str, ...]:
        """Those of strace."""
        inject = f"inject={self.name}:error={self.error}:when={self.number}"
        return ("-e", f"trace=poll,{self.name}", "-e", inject)

    def __str__(self) -> str:
        return f"{self.error} of {self.name} number {self.number} in the {('main', 'computing')[self.thread]} thread"


def errors_of(call: Call) -> list[str]:
    """The errors to try at a call."""
    if call.name not in CALLS or "/LC_MESSAGES/" in call.text:  # nothing can be lost with a translation
        return []
    if call.name == "mmap" and "MAP_ANONYMOUS" in call.text:
        return ["ENOMEM"]  # it has no file that could fail in another way
    return [*ERRORS, *["EMFILE"] * (call.name in OPENS), *["ENOMEM"] * (call.name == "mmap")]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, runs: Runs) -> Averaging:
    """Files of safetensors, mapped in part and read in part; later runs have imported all that they need."""
    run = make_averaging(tmp_path_factory.mktemp("small"), 200_000, count=2)
    runs.run(*run.command(run.sources[0].with_name("learnt.safetensors")), learn=True)
    return run


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Averaging:
    """Files of ``torch.save``."""
    return make_averaging(tmp_path_factory.mktemp("zipped"), 200_000, count=2, write=torch.save)


@dataclass(frozen=True)
class Trial:
    """Runs of one command in one way, each with one fault."""

    runs: Runs
    averaging: Averaging
    output: Path
    unnamed: bool = True
    overwrite: bool = False
    wrong: Sequence[str] = ()

    def run(self, thread: int, options: Sequence[str]) -> Ended:
        """One run, in an output folder like new."""
        arguments = self.averaging.command(
            self.output, "--threads", "1", "--io", "mmap", *begin(self.output, self.overwrite)
        )
        return self.runs.run(*arguments, strace=options, thread=thread, wrong=self.wrong, unnamed=self.unnamed)

    def faults(self) -> list[Fault]:
        """Every fault there can be, learnt from a run of each thread in which nothing fails."""
        found = []
        for thread in (MAIN, WORKER):
            ended = self.run(thread, ("-e", "trace=poll,?" + ",?".join(CALLS)))
            assert (ended.code, self.left) == (0, "new"), ended.error
            numbers: Counter[str] = Counter()
            for call in ended.calls:
                numbers[call.name] += 1
                found += [Fault(thread, call.name, numbers[call.name], error) for error in errors_of(call)]
        return found

    @property
    def left(self) -> str:
        """What stands at the output's path."""
        return state(self.output, self.averaging.new)

    def complaint(self, fault: Fault) -> str | None:
        """Lets a call fail; returns what was wrong with the end, or ``missed`` if there was no such call."""
        ended = self.run(fault.thread, fault.options)
        if not any(call.is_injected for call in ended.calls):
            return "missed"
        fact = self._fact(ended)
        return fact and f"{fault}: {fact}: {_gist(ended.error)}"

    def _fact(self, ended: Ended) -> str | None:
        before = "old" if self.overwrite else "absent"
        if ended.code not in (0, *CLEAN):
            return f"exit {ended.code}"
        if "Traceback" in ended.error:
            return "a traceback"
        if litter(self.output):
            return f"litter: {litter(self.output)}"
        if ended.code == 0:
            return None if self.left == "new" else f"exit 0, and the output is {self.left}"
        if not any(line.startswith("Error: ") for line in ended.error.splitlines()):
            return "no message"
        is_published = self.left == "new" and any(fact in ended.error for fact in PUBLISHED)
        return None if self.left == before or is_published else f"exit {ended.code}, and the output is {self.left}"


def _gist(error: str) -> str:
    """The last line of ours in a traceback, and the last line of all."""
    lines = error.strip().splitlines()
    ours = [line.strip() for line in lines if "/ckpt_avg/" in line and line.startswith("  File")]
    return " ... ".join([*ours[-1:], *lines[-1:]])


def try_all(trial: Trial, faults: Sequence[Fault]) -> Counter[str]:
    """Tries each fault; fails with every complaint, and returns how many were struck and missed."""
    found = {fault: trial.complaint(fault) for fault in faults}
    complaints = [complaint for complaint in found.values() if complaint not in (None, "missed")]
    counts = Counter("missed" if complaint == "missed" else "struck" for complaint in found.values())
    assert not complaints, f"{len(complaints)} of {counts}:\n" + "\n".join(map(str, complaints))
    return counts


def spread(faults: Sequence[Fault], positions: int = 4) -> list[Fault]:
    """A few calls of each name in each thread, the first and the last among them, with the errors in turn."""
    numbers: dict[tuple[int, str], list[int]] = {}
    for fault in faults:
        numbers.setdefault((fault.thread, fault.name), []).append(fault.number)
    steps = [step / (positions - 1) for step in range(positions)]
    chosen = sorted({(*key, each[int(step * (len(each) - 1))]) for key, each in numbers.items() for step in steps})
    errors = {place: ERRORS[index % len(ERRORS)] for index, place in enumerate(chosen)}
    return [fault for fault in faults if errors.get((fault.thread, fault.name, fault.number)) == fault.error]


@pytest.mark.guarantee("interrupted-calls", "system-calls")
@pytest.mark.parametrize(("unnamed", "overwrite", "half"), [(True, False, 0), (False, True, 1)])
def test_a_failed_system_call_is_a_clean_error(
    runs: Runs, small: Averaging, output: Path, unnamed: bool, overwrite: bool, half: int
) -> None:
    trial = Trial(runs, small, output, unnamed, overwrite)
    faults = spread(trial.faults())[half::2]
    counts = try_all(trial, faults)
    assert counts["struck"] >= 0.9 * len(faults) >= 10


@pytest.mark.guarantee("system-calls")
@pytest.mark.campaign
@pytest.mark.parametrize("form", ["small", "zipped"])
@pytest.mark.parametrize(("unnamed", "overwrite"), WAYS)
def test_any_failed_system_call_is_a_clean_error(
    runs: Runs,
    small: Averaging,
    output: Path,
    unnamed: bool,
    overwrite: bool,
    form: str,
    request: pytest.FixtureRequest,
) -> None:
    """Each call of each name with each error."""
    trial = Trial(runs, request.getfixturevalue(form), output, unnamed, overwrite)
    faults = trial.faults()
    counts = try_all(trial, faults)
    print(counts)
    assert counts["struck"] >= 0.95 * len(faults) >= 300


@pytest.mark.parametrize(
    ("wrong", "number", "error", "code"), [("swallowing_errors_of_writes", 1, "EIO", 0), ("in_place", 2, "ENOSPC", 5)]
)
def test_the_harness_catches_a_writer_that_leaves_a_part(
    runs: Runs, small: Averaging, output: Path, wrong: str, number: int, error: str, code: int
) -> None:
    """A control: writers that say that they are done, or that a write failed, and bytes are missing."""
    complaint = Trial(runs, small, output, wrong=[wrong]).complaint(Fault(WORKER, "pwrite64", number, error))
    assert complaint is not None
    assert f"exit {code}, and the output is partial" in complaint


@pytest.mark.guarantee("system-calls")
def test_no_failed_look_lets_an_input_be_replaced(runs: Runs, small: Averaging, output: Path) -> None:
    """The output is one of the checkpoints and ``--overwrite`` is given: refused, also where looking at it fails."""
    output.write_bytes(small.sources[0].read_bytes())
    before = output.read_bytes()
    arguments = ("average", output, small.sources[1], "-o", output, "-q", "--overwrite")
    numbers: Counter[str] = Counter()
    replaced = []
    for call in runs.run(*arguments, strace=("-e", "trace=poll,?" + ",?".join(LOOKS))).calls:
        numbers[call.name] += 1
        if errors_of(call):
            fault = Fault(MAIN, call.name, numbers[call.name], "EIO")
            ended = runs.run(*arguments, strace=fault.options)
            if ended.code == 0 or output.read_bytes() != before:
                replaced.append(f"{fault}: exit {ended.code}: {call.text}")
            output.write_bytes(before)
    assert numbers
    assert replaced == []
