"""A signal ends the command wherever it comes: an import may drop the exception, or be left with a lock."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from ckpt_avg.cli.exits import run

pytestmark = pytest.mark.guarantee("signals")
numbers = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
_modules = itertools.count()


def in_frozen_module(number: int, folder: Path) -> None:
    """Comes while one of Python's own modules runs, as when C code registers its classes."""
    code = f"import os; os.kill(os.getpid(), {number:d}); [None for _ in range(1000)]"
    exec(compile(code, "<frozen abc>", "exec"))


def in_import(number: int, folder: Path) -> None:
    """Comes while a module is imported."""
    name = f"interrupted_{os.getpid()}_{next(_modules)}"
    (folder / f"{name}.py").write_text(f"import os; os.kill(os.getpid(), {number:d}); [None for _ in range(1000)]")
    importlib.import_module(name)


def ended(then: Callable[[], None]) -> tuple[int, float]:
    """The exit code of a command that does this, and the seconds that it took."""
    begin = time.monotonic()
    code = run(click.command()(then), [])
    return code, time.monotonic() - begin


@pytest.fixture(autouse=True)
def modules_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are found in the folder of the test."""
    monkeypatch.syspath_prepend(tmp_path)


@numbers
@pytest.mark.parametrize("seconds", [10, 0], ids=["early", "late"])
@pytest.mark.parametrize("come", [in_frozen_module, in_import])
def test_a_signal_that_c_code_drops_is_not_lost(
    number: int, seconds: int, come: Callable[[int, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it failed, the command would go on as if unasked."""

    def command() -> None:
        try:
            come(number, tmp_path)
        except BaseException:  # as C code does
            if come is in_frozen_module:
                raise AssertionError("it came there, where it may leave a lock behind") from None
        time.sleep(seconds)

    before = signal.getsignal(number)
    code, took = ended(command)
    assert (code, took < 5) == (128 + number, True)
    assert signal.getsignal(number) is before
    assert "Error: " in capsys.readouterr().err


@numbers
def test_what_cleans_up_is_not_interrupted(number: int, tmp_path: Path) -> None:
    """A signal that an import did not drop is on its way: if it came again, hidden files would be left."""
    cleaned = []

    def command() -> None:
        try:
            in_import(number, tmp_path)
        finally:
            time.sleep(0.2)
            cleaned.append(True)

    assert (ended(command)[0], cleaned) == (128 + number, [True])


@numbers
def test_an_import_that_fails_because_of_the_signal_is_not_the_cause(number: int, tmp_path: Path) -> None:
    """As torch says that numpy is missing if the import of numpy was interrupted."""

    def command() -> None:
        try:
            in_import(number, tmp_path)
        except BaseException:
            error = ImportError("there is no numpy")
        raise error

    assert ended(command)[0] == 128 + number
