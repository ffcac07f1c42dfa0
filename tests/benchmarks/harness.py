"""How benchmarks measure: one program run, the page cache, programs that run in turn, and the tables.

The programs of a table run in turn, round after round, so that all of them meet the same noise.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from benchmarks.inputs import files_of, write_random

PROGRAMS = Path(__file__).with_name("programs.py")
IMPORT = "import torch"
FLOOR, OURS, NAIVE = "floor: import torch, fault in, write, fsync", "ckpt-avg", "`safe_open` loop, float64, `save_file`"
TIMM = "as timm's avg_checkpoints.py does"
_MERGEKIT = "mergekit.scripts.run_yaml"
_COLD = 0.001  # of the pages; the readahead of a header may leave a few behind

# A process's peak includes that of the process that started it, up to the exec. So a small one starts it. The kernel
# keeps no peak of the anonymous part alone, so that is looked at every 20 ms.
_LAUNCHER = """
import json, os, subprocess, sys, threading, time
start = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
anonymous, ended, said = 0, threading.Event(), []
def watch():
    global anonymous
    while not ended.wait(0.02):
        try:
            with open(f"/proc/{process.pid}/status", "rb") as file:
                found = [line for line in file if line.startswith(b"RssAnon")]
        except OSError:
            return
        anonymous = max([anonymous, *(int(line.split()[1]) for line in found)])
def listen():
    for line in process.stderr:
        said[:] = [*said[-19:], line.decode(errors="replace")]
threads = [threading.Thread(target=each, daemon=True) for each in (watch, listen)]
for thread in threads:
    thread.start()
_, status, usage = os.wait4(process.pid, 0)
wall = time.monotonic() - start
ended.set()
for thread in threads:
    thread.join()
cpu = usage.ru_utime + usage.ru_stime
code = os.waitstatus_to_exitcode(status)
print(json.dumps([code, wall, cpu, usage.ru_maxrss / 1024, anonymous / 1024, "".join(said)]))
"""


@dataclass(frozen=True)
class Run:
    """Wall seconds, user and system seconds, and the peak resident set and its anonymous part in MiB, of one process.

    The anonymous part is what the process needs itself; the rest are pages of files that it maps.
    """

    wall: float
    cpu: float
    peak: float
    anonymous: float


def run(arguments: list[str]) -> Run:
    """Runs a program to its end; fails if it does."""
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, *arguments]
    printed = subprocess.run(launcher, stdout=subprocess.PIPE, text=True, check=True).stdout
    code, wall, cpu, peak, anonymous, said = json.loads(printed)
    if code != 0:
        raise RuntimeError(f"{arguments[:4]} exited with {code}:\n{said}")
    return Run(wall, cpu, peak, anonymous)


def ckpt_avg(*arguments: object) -> list[str]:
    """Returns the command line of this project's command, quiet."""
    return [sys.executable, "-m", "ckpt_avg", "average", "-q", *map(str, arguments)]


class Rounds(list[Run]):
    """The counted runs of one program: medians of times, and the largest memory."""

    @property
    def wall(self) -> float:
        return median(one.wall for one in self)

    @property
    def cpu(self) -> float:
        return median(one.cpu for one in self)

    @property
    def peak(self) -> str:
        return f"{max(one.peak for one in self):.0f}"

    @property
    def anonymous(self) -> str:
        return f"{max(one.anonymous for one in self):.0f}"

    def less(self, start: Rounds) -> Rounds:
        """Returns the rounds without the median wall time of another program, such as an import."""
        return Rounds(replace(one, wall=one.wall - start.wall) for one in self)

    def ratio(self, to: Rounds) -> float:
        """Returns the median of the rounds' ratios."""
        return median(one.wall / other.wall for one, other in zip(self, to, strict=True))


def arguments_of(description: str | None, sections: Collection[str], **options: float | str) -> argparse.Namespace:
    """Parses the command line: ``--only`` some of the sections, ``--folder``, and options with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", type=lambda text: text.split(","), default=list(sections))
    parser.add_argument("--folder", help="where inputs and outputs are written, on a disk")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.only if name not in sections]:
        parser.error(f"--only: expected some of {', '.join(sections)}, got {', '.join(unknown)}")
    return arguments


# -- The page cache: what of a file the kernel holds in memory -------------------------------------------------------


def resident(paths: Sequence[Path]) -> float:
    """Returns the fraction of the files' pages that are in memory."""
    present = total = 0
    for path in paths:
        if size := path.stat().st_size:
            pages = _mincore(path, size)
            present += len(pages) - pages.count(0)
            total += len(pages)
    return present / total if total else 1.0


def _mincore(path: Path, size: int) -> bytes:
    """Returns a byte for each page, 0 where it is not in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with path.open("rb") as file:
        # Writable and private only because ctypes takes the address of nothing else; it touches no page.
        mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        if libc.mincore(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), size, pages):
            raise OSError(ctypes.get_errno(), str(path))
    return bytes(byte & 1 for byte in pages.raw)


def warm(paths: Sequence[Path]) -> None:
    """Reads what is not in memory yet."""
    for path in paths:
        if resident([path]) < 1:
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def cool(paths: Sequence[Path]) -> float:
    """Drops the files from memory; returns the fraction that is left.

    Where the advice alone does not do it, and this process may, the kernel drops all clean pages; the interpreter's
    and torch's are then read again, so that they are warm as before.
    """
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident(paths)
    if left > _COLD and os.geteuid() == 0:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        except OSError:
            return left
        subprocess.run([sys.executable, "-c", "import torch, ckpt_avg.cli.main"], check=True)
        left = resident(paths)
    return left


# -- Programs in turn, and tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A program to measure.

    Attributes:
        command: from the path of the output to the command line.
        reads: the files that it reads.
    """

    command: Callable[[Path], list[str]]
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
        """Tells whether the disk has room for so many bytes, those of `plain` included; prints a line if not."""
        free = shutil.disk_usage(self.folder).free + len(self._plain) * self.nbytes
        if nbytes > free:
            print(f"{what} skipped: it needs {nbytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free\n", flush=True)
        return nbytes <= free


def in_turn(
    programs: dict[str, Program],
    rounds: int,
    outputs: Path,
    before: Callable[[str, Program], None] = lambda name, program: warm(program.reads),
) -> dict[str, Rounds]:
    """Runs every program once in each round, every second round in the opposite order; the first is not counted.

    Pages that were just written are slower the first times they are looked at, on a virtual machine three times and
    more, and of these programs each has pages of its own.

    Args:
        programs: by name.
        rounds: how many.
        outputs: a folder; the last output of each program stays there, see `output_of`.
        before: called before each run; by default the inputs are brought into the page cache.
    """
    runs = {name: Rounds() for name in programs}
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
    """Returns the path of a program's output."""
    return outputs / f"{list(programs).index(name)}.safetensors"


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def table(*columns: str) -> None:
    """Prints the head of a table."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(*cells: object) -> None:
    """Prints one row; numbers with two decimals."""
    shown = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(shown) + " |", flush=True)


# -- What is compared: this project's command, the floor, loops by hand, other projects' tools -----------------------


@dataclass(frozen=True)
class Peer:
    """A tool to compare with.

    Attributes:
        program: how it is run.
        imports: the module that it imports before it begins.
        python: by which interpreter.
        exact: whether it sums in float64 and divides once, so that its bits must be those of the mean.
        tolerance: the relative error that is allowed otherwise.
    """

    program: Program
    imports: str = "torch"
    python: str = sys.executable
    exact: bool = True
    tolerance: float = 0.0


def script(name: str, inputs: Sequence[Path], python: str = sys.executable) -> Program:
    """Returns a program of `programs`, over files."""
    files = files_of(list(inputs))
    return Program(lambda output: [python, str(PROGRAMS), name, str(output), *map(str, files)], files)


def ours(inputs: Sequence[Path], *options: object) -> Program:
    """Returns this project's command over files or folders of shards."""
    return Program(lambda output: ckpt_avg("-o", output, *options, *inputs), files_of(list(inputs)))


def comparable(inputs: list[Path], python: str, folder: Path) -> dict[str, Peer]:
    """Returns all programs that average these inputs, by name.

    Args:
        inputs: files named ``model.safetensors``, each in a folder with its configuration.
        python: the interpreter that may have the other tools; a line names those that it lacks.
        folder: for their configuration files.
    """
    found = {
        FLOOR: Peer(script("floor", inputs)),
        OURS: Peer(ours(inputs)),
        NAIVE: Peer(script("naive", inputs)),
        TIMM: Peer(script("as_timm", inputs)),
    }
    if version := _version("mergekit", _MERGEKIT, python):
        for dtype in ("float32", "float64"):
            program = Program(_mergekit(inputs, python, folder / f"{dtype}.yml", dtype), inputs)
            # Linear merging adds products with the weight 1 and divides once.
            peer = Peer(program, _MERGEKIT, python, exact=dtype == "float64", tolerance=len(inputs) * 2**-24)
            found[f"mergekit {version}, linear, `--lazy-unpickle`, {dtype}"] = peer
    if version := _version("sd-mecha", "sd_mecha", python):
        # A running average, which rounds in each step: in float64, then once to float32.
        program = script("by_sd_mecha", inputs, python)
        peer = Peer(program, "sd_mecha", python, exact=False, tolerance=2**-23)
        found[f"sd-mecha {version}, `n_average`, float64, 2 threads"] = peer
    return found


def _mergekit(inputs: Sequence[Path], python: str, config: Path, dtype: str) -> Callable[[Path], list[str]]:
    models = [{"model": str(path.parent), "parameters": {"weight": 1.0}} for path in inputs]
    # JSON is YAML.
    config.write_text(json.dumps({"merge_method": "linear", "dtype": dtype, "out_dtype": "float32", "models": models}))
    options = ["--lazy-unpickle", "--allow-crimes", "--no-copy-tokenizer", "--quiet"]
    offline = ["env", "HF_HUB_OFFLINE=1"]
    return lambda output: [*offline, python, "-m", _MERGEKIT, str(config), str(output), *options]


def _version(project: str, module: str, python: str) -> str | None:
    """Returns the version of an installed project, and imports it once, so that its bytecode is compiled."""
    code = f"import {module}; from importlib.metadata import version; print(version({project!r}))"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        print(f"{project} skipped: {python} cannot import it ({reason[0]})\n", flush=True)
        return None
    return done.stdout.split()[-1]
