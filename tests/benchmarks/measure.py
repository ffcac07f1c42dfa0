"""One program run: its wall time and the peak resident set of its whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

# A process's peak includes that of the process that started it, up to the exec. So a small one starts it.
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall = time.monotonic() - start
code = os.waitstatus_to_exitcode(status)
print(json.dumps([code, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


@dataclass(frozen=True)
class Run:
    """Wall seconds, user and system seconds, and the peak resident set in MiB, of one process."""

    wall: float
    cpu: float
    peak: float


def run(arguments: list[str]) -> Run:
    """Runs a program to its end; fails if it does."""
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, *arguments]
    printed = subprocess.run(launcher, stdout=subprocess.PIPE, text=True, check=True).stdout
    code, wall, cpu, peak = json.loads(printed)
    if code != 0:
        raise RuntimeError(f"{arguments[:4]} exited with {code}")
    return Run(wall, cpu, peak)


def ckpt_avg(*arguments: object) -> list[str]:
    """Returns the command line of this project's command, quiet."""
    return [sys.executable, "-m", "ckpt_avg", "average", "-q", *map(str, arguments)]
