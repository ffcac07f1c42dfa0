"""How benchmarks measure: the page cache, programs that run in turn, and tables.

The programs of a table run in turn, round after round, so that all of them meet the same noise.
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from statistics import median

from benchmarks.inputs import files_of, write_random

_COLD = 0.001  # of the bytes; the readahead of a header may leave a few in memory

# A process's peak includes that of the process that started it, up to the exec. So a small one starts it. The kernel
# keeps no peak of the anonymous part alone, so that is looked at every 20 ms.
_LAUNCHER = """
import json, os, subprocess, sys, threading, time
start = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
anonymous, ended = [0], threading.Event()
def watch():
    while not ended.wait(0.02):
        try:
            with open(f"/proc/{process.pid}/status") as file:
                anonymous.extend(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        except OSError:
            return
threading.Thread(target=watch, daemon=True).start()
_, status, used = os.wait4(process.pid, 0)
wall = time.monotonic() - start
ended.set()
memory = [1024e-6 * kibibytes for kibibytes in (used.ru_maxrss, max(anonymous))]
print(json.dumps([os.waitstatus_to_exitcode(status), wall, used.ru_utime, used.ru_stime, *memory]))
"""


@dataclass(frozen=True)
class Run:
    """Wall, user and system seconds, and the peak resident set and its anonymous part in MB, of one process.

    The anonymous part is what the process needs itself; the rest are pages of files that it maps.
    """

    wall: float
    user: float
    system: float
    peak: float
    anonymous: float


def run(arguments: Sequence[str]) -> Run:
    """Runs a program to its end; fails if it does."""
    with tempfile.TemporaryFile("w+") as said:
        launcher = [sys.executable, "-S", "-c", _LAUNCHER, *arguments]
        printed = subprocess.run(launcher, stdout=subprocess.PIPE, stderr=said, text=True, check=True).stdout
        code, *measured = json.loads(printed)
        if code:
            said.seek(0)
            raise RuntimeError(f"{arguments[:4]} exited with {code}:\n{said.read()}")
    return Run(*measured)


def ckpt_avg(*arguments: object, launcher: Sequence[str] = (sys.executable,)) -> list[str]:
    """Returns the command line of this project's command, quiet; the launcher runs a module."""
    return [*launcher, "-m", "ckpt_avg", "average", "-q", *map(str, arguments)]


@dataclass(frozen=True)
class Program:
    """A program to measure.

    Attributes:
        command: from the path of the output to the command line.
        inputs: the files that it reads.
    """

    command: Callable[[Path], list[str]]
    inputs: Sequence[Path] = ()


def python(code: str, interpreter: str = sys.executable) -> Program:
    """Returns a program that runs some code and reads no inputs."""
    return Program(lambda output: [interpreter, "-c", code])


def script(name: str, inputs: Sequence[Path], threads: int = 2, interpreter: str = sys.executable) -> Program:
    """Returns a program of `programs`, over files."""
    command = [interpreter, str(Path(__file__).with_name("programs.py")), f"{name}={threads}"]
    return Program(lambda output: [*command, str(output), *map(str, inputs)], inputs)


def ours(inputs: Sequence[Path], *options: object, launcher: Sequence[str] = (sys.executable,)) -> Program:
    """Returns this project's command over files or folders of shards, with two threads unless an option differs."""
    threads = ("--threads", 2)
    return Program(
        lambda output: ckpt_avg("-o", output, *threads, *options, *inputs, launcher=launcher), files_of(inputs)
    )


# -- The page cache: what of a file the kernel holds in memory -------------------------------------------------------


def warm(paths: Sequence[Path]) -> None:
    """Reads files into memory."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(2**22):
                pass


def cool(paths: Sequence[Path]) -> None:
    """Drops files from memory; fails if they stay."""
    if not paths:
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    asked = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    left = sum(map(int, subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout.split()))
    if left > _COLD * sum(path.stat().st_size for path in paths):
        raise RuntimeError(f"{left / 1e6:.0f} MB of the inputs stay in the page cache")


# -- What was asked for, and where files are -------------------------------------------------------------------------


@dataclass
class Setup:
    """What was asked for on the command line.

    Attributes:
        nbytes: of each checkpoint.
        checkpoints, rounds: how many.
        folder: where inputs and outputs are written.
        peers: the interpreter that runs other projects' tools.
    """

    nbytes: int
    checkpoints: int
    rounds: int
    folder: Path
    peers: str

    @cached_property
    def plain(self) -> list[Path]:
        """Float32 safetensors checkpoints, which several sections share."""
        return write_random(self.empty("plain"), self.checkpoints, self.nbytes)

    def empty(self, name: str) -> Path:
        """Returns a folder of this name, without what an earlier section left in it."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name


# -- Programs in turn, and tables ------------------------------------------------------------------------------------


class Rounds(list[Run]):
    """The counted runs of one program, and the bytes that it reads."""

    nbytes: int = 0

    @property
    def wall(self) -> float:
        """The median."""
        return median(one.wall for one in self)

    def ratio(self, to: Rounds) -> float:
        """Returns the median of the rounds' ratios of wall times."""
        return median(one.wall / other.wall for one, other in zip(self, to, strict=True))

    def cells(self) -> list[str]:
        """Returns the cells of a table below `COLUMNS`."""
        walls = [one.wall for one in self]
        peak = max(one.peak for one in self)
        user, system = (median(getattr(one, name) for one in self) for name in ("user", "system"))
        speed = f"{self.nbytes / self.wall / 1e9:.2f}" if self.nbytes else ""
        return [
            f"{self.wall:.2f} ({min(walls):.2f}–{max(walls):.2f})",
            speed,
            f"{user:.2f} + {system:.2f}",
            f"{peak:.0f}",
        ]


COLUMNS = ("wall, s (range)", "input, GB/s", "processor, s (user + system)", "peak RSS, MB")


class Compared(dict[str, Rounds]):
    """The counted runs of each program, by name; the last output of each is at `output`."""

    def __init__(self, programs: dict[str, Program], folder: Path) -> None:
        super().__init__((name, Rounds()) for name in programs)
        for name, program in programs.items():
            self[name].nbytes = sum(path.stat().st_size for path in program.inputs)
        self._folder = folder

    def output(self, name: str) -> Path:
        """Returns the path of a program's output."""
        return self._folder / f"{list(self).index(name)}.safetensors"

    def show(self, base: str) -> None:
        """Prints a table."""
        table("", *COLUMNS, "time, relative")
        for name, done in self.items():
            row(name, *done.cells(), done.ratio(self[base]))

    def same(self, *names: str) -> None:
        """Fails unless the outputs of these programs are the same bytes; says that they are."""
        first, *others = map(self.output, names or self)
        if not all(filecmp.cmp(first, other, shallow=False) for other in others):
            raise AssertionError("the outputs differ")
        print("\nThe outputs are the same bytes.")


def in_turn(setup: Setup, programs: dict[str, Program], *, rounds: int | None = None, cold: bool = False) -> Compared:
    """Runs every program once in each round, in an order that is drawn for the round, the same whenever this runs.

    What a program leaves to the next, such as a disk that was asked for much and serves less for a while, then falls
    on all of them.

    If the page cache is warm a first round does not count: pages that were just written are slower the first times
    they are looked at, on a virtual machine three times and more.

    Args:
        setup: where outputs are written, and how many rounds.
        programs: by name.
        rounds: instead of the setup's.
        cold: drop the inputs from the page cache before each run, instead of reading them into it.
    """
    done = Compared(programs, setup.empty("outputs"))
    for number in range(1 if cold else 0, 1 + (rounds or setup.rounds)):
        for name in random.Random(number).sample(list(programs), len(programs)):
            output = done.output(name)
            remove(output)
            os.sync()  # what the program before it left to be written is not this one's work
            (cool if cold else warm)(programs[name].inputs)
            measured = run(programs[name].command(output))
            if number:
                done[name].append(measured)
    return done


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def heading(name: str, described: str | None, command: str) -> None:
    """Prints what comes before the table of a section; `page` puts the emphasised line below it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = found[1] if found else platform.machine()  # other machines than x86-64 tell no name
    where = f"{processor}, {date.today()}, load {os.getloadavg()[0]:.1f}"
    print(f"\n## {name}\n\n{described}\n\n*`{command}`, {where}*\n", flush=True)


def table(*columns: str) -> None:
    """Prints the head of a table."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(*cells: object) -> None:
    """Prints one row; numbers with two decimals."""
    shown = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(shown) + " |", flush=True)
