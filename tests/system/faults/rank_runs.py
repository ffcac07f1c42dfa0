"""Ranks for tests: threads of one process, and processes that fail, freeze or are killed at chosen moments.

A `RankServer` has imported everything and forks each group of ranks, so that a group takes about a second. This file is
also the server's own program.
"""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HUNG = 9999  # in place of the exit code of a process that had to be killed


# -- Threads --------------------------------------------------------------------------------------------------------


def in_threads(size: int, work: Callable[..., Any], *, timeout: float = 20.0, silence: float = 20.0) -> list[Any]:
    """Calls ``work(ranks)`` on as many ranks, a thread each: what it returned or raised, by rank.

    As with `ckpt_avg.join_ranks`, each rank leaves at the end, with its error if there is one. Fails if one does not
    end within ``timeout`` seconds. ``silence`` is the timeout of the ranks.
    """
    from torch import distributed

    from ckpt_avg.distributed.ranks import Ranks

    store = distributed.HashStore()
    ends: list[Any] = [TimeoutError("this rank did not end")] * size

    def one(rank: int) -> None:
        ranks = Ranks(rank, size, store, silence)
        try:
            ranks.connect()
            ends[rank] = work(ranks)
        except BaseException as error:
            ends[rank] = error
            ranks.leave(error)
            if ranks.explains(error):
                ends[rank] = ranks.stopped()
        else:
            ranks.leave()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    assert not stuck, f"ranks that did not end: {stuck}; the others: {ends}"
    return ends


def lose(ranks: Any) -> None:
    """Makes a rank that runs in a thread disappear, as a process does that is killed."""
    ranks._group = None


# -- Processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit code as `subprocess` gives it, what it printed, and after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Group:
    """Ranks to be started.

    Attributes:
        size: how many.
        arguments: of the command, on each of them.
        script: run this Python file instead, with the arguments.
        folder: the current one.
        environment: variables of all ranks; None takes one away.
        own: rank → its own values for ``arguments`` and ``folder``.
        faults: rank → [point, action] pairs, see `_interfere` and `_act`.
        signal: sent, once the file ``marker`` exists, to the ranks in ``struck``.
        terminates: whether the others get SIGTERM as soon as one has failed, as launchers do.
        timeout: seconds after which those that are left are killed.
    """

    size: int
    arguments: Sequence[object] = ()
    script: Path | None = None
    folder: Path = Path("/")
    environment: Mapping[str, str | None] = field(default_factory=dict)
    own: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    faults: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    signal: int = signal.SIGTERM
    marker: Path | None = None
    struck: Sequence[int] = ()
    terminates: bool = False
    timeout: float = 30.0


def free_port() -> int:
    """Returns a port that nobody listens at now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        number: int = listening.getsockname()[1]
        return number


class RankServer:
    """Forks groups of ranks from a process that has already imported everything."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, group: Group) -> list[Ended]:
        """Starts the ranks; returns how each of them ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**vars(group), "struck": list(group.struck)}, default=str) + "\n")
        self._process.stdin.flush()
        return [Ended(**each) for each in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@functools.cache
def rank_server() -> RankServer:
    """Returns the one server of this test run; it ends with it."""
    server = RankServer()
    atexit.register(server.close)
    return server


# -- The server's side ----------------------------------------------------------------------------------------------


def _serve() -> None:
    from forking import import_everything

    import_everything()
    while line := sys.stdin.readline():
        group = json.loads(line)
        scratch = Path(tempfile.mkdtemp())
        port = free_port()
        begin = time.monotonic()
        children = []
        for rank in range(group["size"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = _be(group, rank, port, scratch)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        answer = [
            {
                "code": code,
                "seconds": seconds,
                "out": (scratch / f"out.{rank}").read_text(errors="replace"),
                "err": (scratch / f"err.{rank}").read_text(errors="replace"),
            }
            for rank, (code, seconds) in enumerate(_wait(group, children, begin))
        ]
        shutil.rmtree(scratch)
        print(json.dumps(answer), flush=True)


def _wait(group: dict[str, Any], children: list[int], begin: float) -> list[tuple[int, float]]:
    ended: dict[int, tuple[int, float]] = {}
    stopped: set[int] = set()
    is_struck = is_told = False
    while len(ended) < len(children):
        for rank, child in enumerate(children):
            if rank not in ended:
                found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
                if found and os.WIFSTOPPED(status):
                    stopped.add(rank)
                elif found:
                    ended[rank] = (os.waitstatus_to_exitcode(status), time.monotonic() - begin)
        left = [rank for rank in range(len(children)) if rank not in ended]
        if group["marker"] and not is_struck and os.path.exists(group["marker"]):
            is_struck = True
            for rank in group["struck"]:
                os.kill(children[rank], group["signal"])
        if group["terminates"] and not is_told and any(code for code, _ in ended.values()):
            is_told = True
            for rank in left:
                os.kill(children[rank], signal.SIGTERM)
        if left and set(left) <= stopped:
            for rank in left:
                os.kill(children[rank], signal.SIGCONT)
            stopped.clear()
        if time.monotonic() - begin > group["timeout"]:
            for rank in left:
                os.kill(children[rank], signal.SIGKILL)
                os.waitpid(children[rank], 0)
                ended[rank] = (HUNG, time.monotonic() - begin)
        time.sleep(0.005)
    return [ended[rank] for rank in range(len(children))]


def _be(group: dict[str, Any], rank: int, port: int, scratch: Path) -> int:
    """Is one rank; returns its exit code."""
    for number, path in enumerate((Path(os.devnull), scratch / f"out.{rank}", scratch / f"err.{rank}")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    faults = group["faults"].get(str(rank), ())
    group |= group["own"].get(str(rank), {})
    os.chdir(group["folder"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(group["size"]), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(group["size"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in group["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    _interfere(faults)
    arguments = list(map(str, group["arguments"]))
    if group["script"] is not None:
        sys.argv = [group["script"], *arguments]
        sys.path.insert(0, os.path.dirname(group["script"]))
        runpy.run_path(group["script"], run_name="__main__")
        return 0
    from ckpt_avg.cli.exits import run
    from ckpt_avg.cli.main import cli

    return run(cli, arguments)


def _act(action: str) -> None:
    """Does what is asked for at a point: ``kill``, ``stop``, ``sleep SECONDS``, ``mark FILE``, or an errno's name."""
    word, _, rest = action.partition(" ")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif word == "sleep":
        time.sleep(float(rest))
    elif word == "mark":
        Path(rest).touch()
    else:
        raise OSError(getattr(errno, word), os.strerror(getattr(errno, word)))


def _interfere(faults: Sequence[tuple[str, str]]) -> None:
    """Makes this process act, once, at points of its work.

    These are ``start``; ``before STEP`` and ``after STEP`` of `Ranks.exchange`; ``before CALL`` and ``after CALL`` of a
    function in `os`, and of ``destroy_process_group``; and ``in write``: when a piece of the data section is half
    written.
    """
    from torch import distributed

    from ckpt_avg.distributed.ranks import Ranks

    lock = threading.Lock()
    left = list(map(tuple, faults))

    def at(point: str) -> None:
        with lock:
            due = [fault for fault in left if fault[0] == point]
            left[:] = [fault for fault in left if fault[0] != point]
        for _, action in due:
            _act(action)

    def around(owner: Any, name: str, what: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            point = what(*arguments)
            at(f"before {point}")
            result = real(*arguments, **keywords)
            at(f"after {point}")
            return result

        setattr(owner, name, call)

    if not faults:
        return
    around(Ranks, "exchange", lambda ranks, step, *rest: step)
    around(distributed, "destroy_process_group", lambda *arguments: "destroy_process_group")
    for name in ("fsync", "link", "replace", "posix_fallocate"):
        around(os, name, lambda *arguments, name=name: name)
    pwrite = os.pwrite

    def half(descriptor: int, contents: memoryview, offset: int) -> int:
        if offset and any(where == "in write" for where, _ in left):
            pwrite(descriptor, contents[: len(contents) // 2], offset)
            at("in write")
        return pwrite(descriptor, contents, offset)

    os.pwrite = half  # type: ignore[assignment]
    at("start")


if __name__ == "__main__":
    _serve()
