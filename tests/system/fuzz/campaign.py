"""Mutated inputs for one reader, in a process of its own, so that a crash, a hang or a large allocation shows.

``python -m system.fuzz.campaign READER FOLDER SEED COUNT SECONDS TRACE`` prints what it found as JSON. Each input may
take so many seconds of processor time, and the address space may grow by `MEMORY` bytes: what asks for more meets a
MemoryError, which is none of our exceptions. Where TRACE is 1, the peak of each input is measured instead.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from system.fuzz.corpus import PARSERS, SEEDS
from system.fuzz.mutate import inputs
from system.fuzz.planted import PLANTED
from system.fuzz.targets import FILE_NAMES, Target, make_target, memory_folder

SECONDS = 2.0
MEMORY = 64 * 2**20  # and four times the input, which is small here


class TooSlowError(BaseException):
    """An input took too long; no Exception, so that no reader can catch it."""


@dataclass
class Findings:
    """What came of a run: exceptions that are not ours, each kind once, with the input in hexadecimal."""

    count: int = 0
    accepted: int = 0
    worst_seconds: float = 0.0
    worst_bytes: int = 0  # of memory: of one input if traced, else by which the process grew
    seconds: float = 0.0
    finds: dict[str, str] = field(default_factory=dict)


def run(
    reader: str, count: int, *, seed: int = 0, trace: bool = False, limit: float = SECONDS, timeout: float = 120
) -> Findings:
    """Runs the inputs in a child; its death by a signal, and its silence for ``timeout`` seconds, are finds too."""
    with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="fuzz-") as folder:
        command = [
            sys.executable,
            "-m",
            "system.fuzz.campaign",
            reader,
            folder,
            *map(str, (seed, count, limit, int(trace))),
        ]
        last = Path(folder) / FILE_NAMES[_parser(reader)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, cwd=Path(__file__).parents[2]
            )
        except subprocess.TimeoutExpired:
            return Findings(finds={f"no answer in {timeout} s": _hex(last)})
        if done.returncode < 0:
            return Findings(finds={f"signal {-done.returncode}": _hex(last)})
        if done.returncode != 0:
            return Findings(finds={f"exit {done.returncode}: {done.stderr[-2000:]}": _hex(last)})
        return Findings(**json.loads(done.stdout))


def _hex(last: Path) -> str:
    """Returns the input that was the last one; nothing if none was reached."""
    return last.read_bytes().hex() if last.exists() else ""


def _parser(reader: str) -> str:
    return reader if reader in PARSERS else "safetensors"


def _target(reader: str, folder: Path) -> Target:
    return make_target(reader, folder) if reader in PARSERS else PLANTED[reader](folder)


def work(reader: str, folder: Path, seed: int, count: int, limit: float, trace: bool) -> Findings:
    """Feeds a reader with mutated inputs, in this process, each for ``limit`` seconds of processor time."""
    found, parser, target = Findings(), _parser(reader), _target(reader, folder)
    for each in SEEDS[parser]:
        if not target(each.content) and reader in PARSERS:
            raise AssertionError(f"a sound {parser} is refused: {each.content!r}")
    signal.signal(signal.SIGPROF, _too_slow)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if trace:
        tracemalloc.start()
    else:
        limit_memory(MEMORY)
    start = time.monotonic()
    for content in islice(inputs(parser, seed), count):
        _one(target, content, found, limit, trace)
    found.seconds = time.monotonic() - start
    if not trace:
        found.worst_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return found


def limit_memory(more: int) -> None:
    """Lets this process have so many bytes of address space more than it has."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _one(target: Target, content: bytes, found: Findings, limit: float, trace: bool) -> None:
    if trace:
        tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0] if trace else 0
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        found.accepted += target(content)
    except (Exception, TooSlowError) as error:
        found.finds.setdefault(f"{type(error).__name__}: {str(error)[:300]}", content.hex())
    signal.setitimer(signal.ITIMER_PROF, 0)
    found.worst_seconds = max(found.worst_seconds, time.process_time() - start)
    found.count += 1
    if trace:
        peak = tracemalloc.get_traced_memory()[1] - held
        found.worst_bytes = max(found.worst_bytes, peak)
        if peak > MEMORY + 4 * len(content):
            found.finds.setdefault(f"{peak} bytes of memory", content.hex())


def _too_slow(*_: Any) -> None:
    raise TooSlowError("more than its processor time")


if __name__ == "__main__":
    of, where, *rest = sys.argv[1:]
    result = work(of, Path(where), int(rest[0]), int(rest[1]), float(rest[2]), bool(int(rest[3])))
    print(json.dumps(vars(result)))
