"""Runs of the command in processes that are killed, interrupted or starved at chosen moments.

A `Server` imports torch once and forks a process for every run, so that hundreds of runs take seconds. This file is
also the server's own program.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

# The system calls by which an output comes into being.
CALLS = ("open", "posix_fallocate", "pwrite", "fsync", "link", "rename", "replace")
REQUIRE = "CKPT_AVG_TEST_REQUIRE"  # names what must not be skipped, for CI: "mount"


@dataclass(frozen=True)
class Outcome:
    """What became of one run: exit codes as `subprocess` gives them, stderr, and how long all of it took."""

    codes: list[int]
    errors: list[str]
    seconds: float

    @property
    def code(self) -> int:
        """The exit code of the only process."""
        assert len(self.codes) == 1
        return self.codes[0]

    @property
    def error(self) -> str:
        """What the only process wrote to stderr."""
        assert len(self.errors) == 1
        return self.errors[0]


class Server:
    """Forks runs from a process that has already imported everything. Use it as a context manager."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        sources: Sequence[Path],
        output: Path,
        *options: str,
        count: int = 1,
        kill_after: float | None = None,
        at: int | None = None,
        moment: str = "before",
        number: int = signal.SIGKILL,
        writer: str = "command",
        unnamed: bool = True,
        file_size: int | None = None,
        calls: Path | None = None,
    ) -> Outcome:
        """Averages in forked processes.

        Args:
            sources, output, options: of the command.
            count: processes side by side.
            kill_after: seconds after which each gets the signal.
            at: the index of the system call at which it sends itself the signal; see `CALLS`.
            moment: ``before``, ``during`` (half of a write) or ``after`` that call.
            number: the signal.
            writer: ``command``, or ``naive``: one that opens the output itself.
            unnamed: whether the system has ``O_TMPFILE``.
            file_size: a limit on the size of files, in bytes.
            calls: a file that gets the name of each system call, a line each.
        """
        job: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        job |= {"sources": list(map(str, sources)), "output": str(output), "calls": calls and str(calls)}
        job["scratch"] = str(self._scratch)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def state(output: Path, new: bytes, old: bytes | None = None) -> str:
    """Returns what stands at a path: ``absent``, ``old``, ``new``, or ``partial`` for anything else."""
    try:
        contents = output.read_bytes()
    except FileNotFoundError:
        return "absent"
    return "new" if contents == new else "old" if contents == old else "partial"


def litter(output: Path) -> list[str]:
    """Returns every other name in the output's folder."""
    return sorted(name for name in os.listdir(output.parent) if name != output.name)


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where none may be mounted."""
    import pytest

    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = mounted.stderr.strip() if mounted.returncode else ""
    except FileNotFoundError as error:
        reason = str(error)
    if reason:
        if "mount" in os.environ.get(REQUIRE, ""):
            pytest.fail(f"{REQUIRE} asks for mounts, and none was possible: {reason}")
        pytest.skip(f"needs a file system of its own, and mounting one failed: {reason}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# -- The server's side ----------------------------------------------------------------------------------------------


def _serve() -> None:
    from forking import import_everything

    import_everything()
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.monotonic()
        logs = [Path(job["scratch"]) / f"stderr.{index}" for index in range(job["count"])]
        children = [_fork(job, log) for log in logs]
        if job["kill_after"] is not None:
            time.sleep(max(0.0, begin + job["kill_after"] - time.monotonic()))
            for child in children:
                os.kill(
                    child, job["number"]
                )  # a child that has ended is not reaped yet, so its number is still its own
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        seconds = time.monotonic() - begin
        errors = [log.read_text(errors="replace") for log in logs]
        print(json.dumps({"codes": codes, "errors": errors, "seconds": seconds}), flush=True)


def _fork(job: dict[str, Any], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        for number, path in enumerate((os.devnull, os.devnull, str(log))):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        code = _run(job)
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(job: dict[str, Any]) -> int:
    from ckpt_avg.cli.exits import run
    from ckpt_avg.cli.main import cli

    if not job["unnamed"]:
        del os.O_TMPFILE
    if job["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    if job["at"] is not None or job["calls"] is not None:
        _interfere(job)
    if job["writer"] == "naive":
        return _naive(job)
    return run(cli, ["average", *job["sources"], "-o", job["output"], "-q", *job["options"]])


def _interfere(job: dict[str, Any]) -> None:
    """Counts the calls of `CALLS` and sends the signal at the chosen one."""
    lock = threading.Lock()
    seen: list[str] = []

    def strike() -> None:
        os.kill(os.getpid(), job["number"])
        if job["number"] == signal.SIGKILL:
            time.sleep(60)

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_CREAT | getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY):
                return real(*arguments, **keywords)
            with lock:
                index = len(seen)
                folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
                seen.append("fsync of the folder" if folder else name)
                if job["calls"] is not None:
                    Path(job["calls"]).write_text("\n".join(seen))
            if index == job["at"] and job["moment"] == "before":
                strike()
            if index == job["at"] and job["moment"] == "during" and name == "pwrite":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                strike()
            result = real(*arguments, **keywords)
            if index == job["at"] and job["moment"] == "after":
                strike()
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def _naive(job: dict[str, Any]) -> int:
    """What this package must not do: the output grows under its own name."""
    contents = Path(job["sources"][0]).read_bytes()
    descriptor = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    step = max(1, len(contents) // 12)
    for offset in range(0, len(contents), step):
        os.pwrite(descriptor, contents[offset : offset + step], offset)
        os.fsync(descriptor)
    return 0


if __name__ == "__main__":
    _serve()
