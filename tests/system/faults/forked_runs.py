"""Runs of the command whose system calls strace sees, or lets fail, from the moment that the command's own code begins.

Python and torch make thousands of calls before that. So a `Runs` starts `forking`, a program that has imported
everything and forks a process for each run; the process waits until strace is attached to it, or to the one thread that
is of interest, and then goes on.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from system.faults import forking
from system.faults.tracing import Call, parse, refuse_or_skip


@dataclass(frozen=True)
class Ended:
    """What became of a run: its exit code as `subprocess` gives it, what it printed, and its system calls."""

    code: int
    stdout: str
    error: str
    calls: list[Call]
    seconds: float


class Runs:
    """Forks runs from a process that has already imported everything; see `shared_runs`.

    Args:
        scratch: an empty folder for what the runs print.
    """

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, forking.__file__, str(scratch)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        *arguments: object,
        wrong: Sequence[str] = (),
        strace: Sequence[str] = (),
        thread: int = 0,
        signalled: tuple[int, float] | None = None,
        unnamed: bool = True,
        learn: bool = False,
    ) -> Ended:
        """Runs the command once.

        Args:
            arguments: of the command.
            wrong: functions of `wrong_writers` that change the command first.
            strace: its options, without which there is none; it sees at least ``poll``.
            thread: whose calls it sees: 0 is the main thread, 1 the first that is started. More with ``-f``.
            signalled: a signal, and the seconds after the command's beginning at which it is sent.
            unnamed: whether the system has ``O_TMPFILE``.
            learn: import for all later runs what this one needs, so that they do not look for modules.
        """
        if strace and shutil.which("strace") is None:
            refuse_or_skip("strace", "needs strace, which is not installed")
        job = {
            "arguments": list(map(str, arguments)),
            "wrong": list(wrong),
            "strace": list(strace),
            "thread": thread,
            "signalled": signalled,
            "unnamed": unnamed,
            "learn": learn,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        if found["refused"]:
            refuse_or_skip("strace", f"needs strace, which could not attach: {found['refused']}")
        return Ended(found["code"], found["stdout"], found["error"], parse(found["trace"]), found["seconds"])

    def close(self) -> None:
        """Ends the process that forks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=forking.LIMIT)
        self._process.stdout.close()


@functools.cache
def shared_runs() -> Runs:
    """Returns the `Runs` of all test modules, since one takes seconds to start. It ends with the tests."""
    scratch = tempfile.TemporaryDirectory()
    runs = Runs(Path(scratch.name))
    atexit.register(scratch.cleanup)
    atexit.register(runs.close)
    return runs
