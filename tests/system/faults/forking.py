"""The program that forks runs of the command; `runs` starts it, and tells it on stdin what to run.

A single run waits at a gate until strace, if it is asked for, has attached to it or to one of its threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# The calls by which an output comes into being.
CALLS = ("open", "posix_fallocate", "pwrite", "fsync", "link", "rename", "replace")
LOGS = ("stdout", "stderr", "made")
LIMIT = 60  # seconds that a run may take; a longer one is killed by SIGALRM, and no code of ours is -14


@dataclass(frozen=True)
class _Gate:
    """Where a thread of the forked process says which one it is, and waits to be let through."""

    announce: int
    opened: int

    def wait(self) -> None:
        os.write(self.announce, f"{threading.get_native_id()}\n".encode())
        os.close(self.announce)
        opened = select.poll()
        opened.register(self.opened, select.POLLIN)
        while not opened.poll(1):  # short, so that strace prints a call as soon as it has attached
            pass


def import_everything() -> None:
    """Imports torch and all of this package, so that a fork has nothing left to import."""
    import torch

    import ckpt_avg

    for module in pkgutil.walk_packages(ckpt_avg.__path__, "ckpt_avg."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of an optional package
                importlib.import_module(module.name)
    torch.ones(2).double().sum()  # at its first one torch looks at the processor, and dies itself if that fails


def _serve(scratch: Path) -> None:
    import_everything()
    for line in sys.stdin:
        job = json.loads(line)
        answer = _race(job, scratch) if job["count"] > 1 else _trace(job, scratch)
        if job["learn"]:
            for name in (scratch / "modules").read_text().split():
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        print(json.dumps(answer), flush=True)


def _race(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Runs that start as nearly at once as they can."""
    begin = time.monotonic()
    children = []
    for index in range(job["count"]):
        child = os.fork()
        if not child:
            _be_the_run(job, scratch, index, None)
        children.append(child)
    return {"refused": "", "ended": [_ended(child, scratch, index, begin) for index, child in enumerate(children)]}


def _trace(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One run, which may be traced or get a signal."""
    said, announce = os.pipe()
    opened, opener = os.pipe()
    log = scratch / "trace"
    log.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.close(said)
        _be_the_run(job, scratch, 0, _Gate(announce, opened))
    os.close(announce)
    thread = os.read(said, 32).decode().strip()  # empty if it has ended without such a thread
    tracer, refused = _attach(job["strace"], thread, log, child) if job["strace"] and thread else (None, "")
    begin = time.monotonic()
    os.write(opener, b"x")
    if job["signalled"] is not None:
        number, delay = job["signalled"]
        time.sleep(delay)
        os.kill(child, number)  # one that has ended is not reaped yet, so its number is still its own
    ended = _ended(child, scratch, 0, begin)
    if tracer is not None:
        tracer.wait()
    for descriptor in (said, opened, opener):
        os.close(descriptor)
    ended["calls"] = log.read_text(errors="replace") if log.exists() else ""
    return {"refused": refused, "ended": [ended]}


def _ended(child: int, scratch: Path, index: int, begin: float) -> dict[str, Any]:
    """Waits for a run; returns what became of it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begin
    stdout, error, made = ((scratch / f"{name}.{index}").read_text(errors="replace") for name in LOGS)
    return {
        "code": code,
        "stdout": stdout,
        "error": error,
        "calls": "",
        "made": made.split(",") if made else [],
        "seconds": seconds,
    }


def _attach(options: list[str], thread: str, log: Path, child: int) -> tuple[subprocess.Popen[bytes], str]:
    """Starts strace, and waits until it has seen a call; returns it and why it refuses to."""
    complaints = log.with_name("strace.stderr")
    with complaints.open("wb") as file:
        tracer = subprocess.Popen(["strace", *options, "-o", str(log), "-p", thread], stderr=file)
    while not (log.exists() and log.stat().st_size):
        if tracer.poll() is not None:
            return tracer, complaints.read_text() or "it ended at once"
        time.sleep(0.001)
    return tracer, ""


def _be_the_run(job: dict[str, Any], scratch: Path, index: int, gate: _Gate | None) -> NoReturn:
    code = 99
    try:
        stdout, stderr, made = (scratch / f"{name}.{index}" for name in LOGS)
        made.write_text("")
        for number, path in enumerate((os.devnull, stdout, stderr)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        signal.alarm(LIMIT)
        code = _run(job, made, gate)
        if job["learn"]:
            (scratch / "modules").write_text("\n".join(sorted(set(sys.modules) - {"__main__"})))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        code = 1  # as of the interpreter
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(job: dict[str, Any], made: Path, gate: _Gate | None) -> int:
    import wrong_writers

    from ckpt_avg.cli.exits import run
    from ckpt_avg.cli.main import cli

    if not job["unnamed"]:
        del os.O_TMPFILE
    if job["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    if job["at"] is not None or job["record"]:
        _interfere(job, made)
    main = functools.partial(run, cli if job["signalled"] is None else _Interruptible(cli))
    for name in job["wrong"]:
        main = getattr(wrong_writers, name)(job["arguments"]) or main
    if gate is not None:
        gate.wait() if job["thread"] == 0 else _stop_thread(job["thread"], gate)
    if job["spare_memory"] is not None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + job["spare_memory"] * 2**20,) * 2)
    return main(job["arguments"])


def _interfere(job: dict[str, Any], made: Path) -> None:
    """Writes down the calls of `CALLS`, and sends the signal at the chosen one."""
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
                if job["record"]:
                    made.write_text(",".join(seen))
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


class _Interruptible:
    """The command. Signals wait until it listens for them, and no longer come when it has stopped to."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, command: Any) -> None:
        self._command = command
        signal.pthread_sigmask(signal.SIG_BLOCK, self._NUMBERS)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)
        return self._command.make_context(*arguments, **options)

    def invoke(self, context: Any) -> None:
        try:
            self._command.invoke(context)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._NUMBERS)


def _stop_thread(index: int, gate: _Gate) -> None:
    """Makes a thread that the command starts wait at the gate, before it does anything."""
    real: Callable[[threading.Thread], None] = threading.Thread.run
    started: list[threading.Thread] = []

    def run(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == index:
            gate.wait()
        real(thread)

    threading.Thread.run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
