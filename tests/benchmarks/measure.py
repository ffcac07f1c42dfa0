"""One program run: its wall time and the peak resident set of its whole process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """Wall seconds, user and system seconds, and the peak resident set in MiB, of one process."""

    wall: float
    cpu: float
    peak: float


def run(arguments: list[str], cwd: Path | None = None) -> Run:
    """Runs a program to its end; fails if it does."""
    start = time.monotonic()
    process = subprocess.Popen(arguments, cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{arguments[:4]} exited with {process.returncode}")
    return Run(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def ckpt_avg(*arguments: object) -> list[str]:
    """Returns the command line of this project's command, quiet."""
    return [sys.executable, "-m", "ckpt_avg", "average", "-q", *map(str, arguments)]
