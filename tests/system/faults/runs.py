"""Runs of the command that are killed, interrupted or starved at chosen moments, or whose system calls strace sees.

Python and torch make thousands of calls before the command's own code begins, and importing them takes seconds. So a
`Runs` starts `forking`, a program that has imported everything and forks a process for each run; a traced one waits
until strace is attached to it, or to the one thread that is of interest, and then goes on.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.faults import forking
from system.faults.tracing import Call, parse, refuse_or_skip


@dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
        code: as `subprocess` gives it.
        stdout, error: what it printed.
        calls: its system calls that strace saw.
        made: the calls of Python's by which its output came about, if they were recorded or struck.
        seconds: how long it took.
    """

    code: int
    stdout: str
    error: str
    calls: list[Call]
    made: list[str]
    seconds: float


class Runs:
    """Forks runs from a process that has already imported everything; see `shared_runs`.

    Args:
        scratch: an empty folder for what the runs print.
    """

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, forking.__file__, str(scratch)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: object, **options: Any) -> Ended:
        """Runs the command once; see `race` for the options."""
        (ended,) = self.race(1, *arguments, **options)
        return ended

    def race(
        self,
        count: int,
        *arguments: object,
        wrong: Sequence[str] = (),
        strace: Sequence[str] = (),
        thread: int = 0,
        signalled: tuple[int, float] | None = None,
        at: int | None = None,
        moment: str = "before",
        number: int = signal.SIGKILL,
        record: bool = False,
        unnamed: bool = True,
        file_size: int | None = None,
        spare_memory: int | None = None,
        learn: bool = False,
    ) -> list[Ended]:
        """Runs the command in so many processes side by side.

        Args:
            count: how many; strace and signals are for one alone.
            arguments: of the command.
            wrong: functions of `wrong_writers` that change the command first.
            strace: its options, without which there is none; it sees at least ``poll``.
            thread: whose calls it sees: 0 is the main thread, 1 the first that is started. More with ``-f``.
            signalled: a signal, and the seconds after the command's beginning at which it is sent.
            at: the index of the call at which the run sends itself a signal; see `forking.CALLS`.
            moment: ``before``, ``during`` (half of a write) or ``after`` that call.
            number: that signal.
            record: whether the names of those calls are returned.
            unnamed: whether the system has ``O_TMPFILE``.
            file_size: a limit on the size of files, in bytes.
            spare_memory: a limit on the address space, in MiB more than it takes at the beginning.
            learn: import for all later runs what this one needs, so that they do not look for modules.
        """
        if strace and shutil.which("strace") is None:
            refuse_or_skip("strace", "needs strace, which is not installed")
        job = {name: value for name, value in locals().items() if name != "self"}
        job["arguments"] = list(map(str, arguments))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer["refused"]:
            refuse_or_skip("strace", f"needs strace, which could not attach: {answer['refused']}")
        return [Ended(**{**ended, "calls": parse(ended["calls"])}) for ended in answer["ended"]]

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
