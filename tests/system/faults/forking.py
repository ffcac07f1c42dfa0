"""The program that forks runs of the command; `forked_runs` starts it, and tells it on stdin what to run.

Each run waits at a gate until strace, if it is asked for, has attached to it or to one of its threads.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
        answer = _answer(job, scratch)
        if job["learn"]:
            for name in (scratch / "modules").read_text().split():
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        print(json.dumps(answer), flush=True)


def _answer(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    said, announce = os.pipe()
    opened, opener = os.pipe()
    log = scratch / "trace"
    log.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.close(said)
        _be_the_run(job, scratch, _Gate(announce, opened))
    os.close(announce)
    thread = os.read(said, 32).decode().strip()  # empty if it has ended without such a thread
    tracer, refused = _attach(job["strace"], thread, log, child) if job["strace"] and thread else (None, "")
    begin = time.monotonic()
    os.write(opener, b"x")
    if job["signalled"] is not None:
        number, delay = job["signalled"]
        time.sleep(delay)
        os.kill(child, number)  # one that has ended is not reaped yet, so its number is still its own
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begin
    if tracer is not None:
        tracer.wait()
    for descriptor in (said, opened, opener):
        os.close(descriptor)
    return {
        "code": code,
        "stdout": (scratch / "stdout").read_text(errors="replace"),
        "error": (scratch / "stderr").read_text(errors="replace"),
        "trace": log.read_text(errors="replace") if log.exists() else "",
        "seconds": seconds,
        "refused": refused,
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


def _be_the_run(job: dict[str, Any], scratch: Path, gate: _Gate) -> NoReturn:
    code = 99
    try:
        for number, path in enumerate((os.devnull, scratch / "stdout", scratch / "stderr")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        signal.alarm(LIMIT)
        code = _run(job, gate)
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


def _run(job: dict[str, Any], gate: _Gate) -> int:
    import wrong_writers

    from ckpt_avg.cli.exits import run
    from ckpt_avg.cli.main import cli

    if not job["unnamed"]:
        del os.O_TMPFILE
    for name in job["wrong"]:
        getattr(wrong_writers, name)(job["arguments"])
    command: Any = cli
    if job["signalled"] is not None:
        command = _Interruptible(cli)
    if job["thread"] == 0:
        gate.wait()
    else:
        _stop_thread(job["thread"], gate)
    return run(command, job["arguments"])


class _Interruptible:
    """The command. Signals wait until it listens for them, and no longer come when it has stopped to."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, command: Any) -> None:
        self._command = command
        signal.pthread_sigmask(signal.SIG_BLOCK, self._NUMBERS)

    def make_context(self, *arguments: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)
        return self._command.make_context(*arguments)

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
