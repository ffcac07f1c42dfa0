"""Shared by all tests: the folder of the real run, and calls of the command."""

from __future__ import annotations

import os

# Several test processes share the cores; torch's own threads would spin against each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# A shell's background jobs ignore Ctrl-C, jobs of nohup SIGHUP, and so would the commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

RUN = Path(__file__).parent.parent / "fixtures" / "mnist_cnn"


@pytest.fixture(scope="session")
def run_folder() -> Path:
    """The real training run: epoch_9.pt … epoch_20.pt."""
    return RUN


@pytest.fixture(autouse=True)
def words(request: pytest.FixtureRequest) -> Iterator[None]:
    """Messages are tested in the words of the command line, and under the mark ``python_words`` in those of Python."""
    from ckpt_avg.wording import for_command_line

    with contextlib.nullcontext() if request.node.get_closest_marker("python_words") else for_command_line():
        yield


@pytest.fixture(scope="session")
def train() -> ModuleType:
    """The run's training script, with make_model, train_loader and evaluate."""
    sys.path.insert(0, str(RUN))
    try:
        import train as module
    finally:
        sys.path.remove(str(RUN))
    return module


@pytest.fixture
def ckpt_avg(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command in a process of its own, as a user would, in an empty folder."""

    def call(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckpt_avg", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False, **options
        )

    return call


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, which is faster: (exit code, stdout, stderr)."""
    from ckpt_avg.cli.exits import run
    from ckpt_avg.cli.main import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(cli, list(map(str, arguments)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


class HangError(BaseException):
    """A test that did not end; no Exception, so that nothing that is tested can catch it."""


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails the test after half a minute of processor time, or two of waiting: it would not end."""

    def fail(*_: object) -> None:
        raise HangError

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, 30), signal.ITIMER_REAL: (signal.SIGALRM, 120)}
    before = {number: signal.signal(number, fail) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    yield
    for timer, (number, _) in timers.items():
        signal.setitimer(timer, 0)
        signal.signal(number, before[number])
