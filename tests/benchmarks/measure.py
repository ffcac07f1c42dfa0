"""One program run: its wall time and the peak resident set of its whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

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
