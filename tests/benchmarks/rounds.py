"""Programs that are run in turn, round after round, so that all of them meet the same noise; and the tables."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from inputs import write_random
from measure import Run, run
from page_cache import warm

Command = Callable[[Path], list[str]]
Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Program:
    """A program to measure.

    Attributes:
        command: from the path of the output to the command line.
        reads: the files that it reads.
    """

    command: Command
    reads: Sequence[Path] = ()


def importing(module: str, python: str = sys.executable) -> Program:
    """Returns a program that imports a module and ends."""
    return Program(lambda output: [python, "-c", f"import {module}"])


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
    _plain: list[Path] = field(default_factory=list)

    def plain(self) -> list[Path]:
        """Returns float32 safetensors checkpoints, which several sections share."""
        if not self._plain:
            self._plain = write_random(self.scratch("plain"), self.checkpoints, self.nbytes)
        return self._plain

    def release(self) -> None:
        """Removes what `plain` wrote."""
        self._plain = []
        shutil.rmtree(self.folder / "plain", ignore_errors=True)

    def scratch(self, name: str | None = None) -> Path:
        """Returns a new folder for inputs or outputs."""
        if name is None:
            return Path(mkdtemp(dir=self.folder))
        (self.folder / name).mkdir()
        return self.folder / name

    def has_room(self, what: str, nbytes: float) -> bool:
        """Tells whether the disk has room for so many bytes, those of `plain` included; says so where it has not."""
        free = shutil.disk_usage(self.folder).free + len(self._plain) * self.nbytes
        if nbytes > free:
            print(f"{what} left out: it needs {nbytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free\n", flush=True)
        return nbytes <= free


def in_turn(
    programs: dict[str, Program],
    rounds: int,
    outputs: Path,
    before: Callable[[str, Program], None] = lambda name, program: warm(program.reads),
) -> Runs:
    """Runs every program once in each round, every second round in the opposite order; the first is not counted.

    Pages that were just written are slower the first times they are looked at, on a virtual machine three times and
    more, and of these programs each has pages of its own.

    Args:
        programs: by name.
        rounds: how many.
        outputs: a folder; the last output of each program stays there, see `output_of`.
        before: called before each run; by default the inputs are brought into the page cache.
    """
    runs: Runs = {name: [] for name in programs}
    for number in range(rounds + 1):
        order = list(programs) if number % 2 == 0 else list(programs)[::-1]
        for name in order:
            output = output_of(name, programs, outputs)
            remove(output)
            before(name, programs[name])
            os.sync()  # what the program before it left to be written is not this one's work
            done = run(programs[name].command(output))
            if number:
                runs[name].append(done)
    return runs


def output_of(name: str, programs: Iterable[str], outputs: Path) -> Path:
    """Returns where a program's output lies."""
    return outputs / f"{list(programs).index(name)}.safetensors"


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def walls(runs: Sequence[Run], without: Sequence[Run] | None = None) -> list[float]:
    """Returns each round's wall seconds, less the median of another program's."""
    less = 0.0 if without is None else median(one.wall for one in without)
    return [one.wall - less for one in runs]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the median of the rounds' ratios."""
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def median(values: Iterable[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def table(*columns: str) -> None:
    """Prints the head of a table."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(*cells: object) -> None:
    """Prints one row; numbers with two decimals."""
    shown = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(shown) + " |", flush=True)
