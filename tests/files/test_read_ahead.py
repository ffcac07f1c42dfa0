"""Reading ahead: everything is asked for once, all inputs in turn, and neither errors nor the end of a run matter."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest
from mean.inputs import digest, mixed_run, save

from ckpt_avg import average
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.read_ahead import ReadAhead

MiB = 2**20


class Recorded:
    """A file that records what is loaded of it; loading waits for permission."""

    def __init__(self, name: str, loaded: list[tuple[str, int, int]]) -> None:
        self.name, self.loaded, self.permission = name, loaded, threading.Event()

    def load(self, offset: int, length: int) -> None:
        self.permission.wait(20)
        self.loaded.append((self.name, offset, length))


def spans(*chosen: tuple[Recorded, int, int]) -> Any:
    return [cast(tuple[InputFile, int, int], each) for each in chosen]


def test_the_inputs_are_read_in_turn_and_each_byte_once() -> None:
    """A request of each input at a time, so that the first block is complete as early as possible."""
    loaded: list[tuple[str, int, int]] = []
    a, b = Recorded("a", loaded), Recorded("b", loaded)
    for each in (a, b):
        each.permission.set()
    with ReadAhead(1) as ahead:
        ahead.ask([spans((a, 100, 100 + 2 * MiB + 7)), spans((b, 0, MiB), (b, 5 * MiB, 5 * MiB + 1))])
        while len(loaded) < 5:
            threading.Event().wait(0.001)
    assert loaded == [
        ("a", 100, MiB), ("b", 0, MiB), ("a", 100 + MiB, MiB), ("b", 5 * MiB, 1), ("a", 100 + 2 * MiB, 7),
    ]  # fmt: skip


def test_what_is_left_is_not_read_once_the_run_is_over() -> None:
    """Otherwise an error would be shown only after everything was read."""
    loaded: list[tuple[str, int, int]] = []
    file = Recorded("a", loaded)
    with ReadAhead(2) as ahead:
        ahead.ask([spans((file, 0, 1000 * MiB))])
        threading.Timer(0.1, file.permission.set).start()
    assert len(loaded) <= 2
    assert not [each for each in threading.enumerate() if each.name.startswith("reader")]


def test_threads_that_cannot_be_started_are_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under a limit on threads or on memory: reading ahead is a help, not a need."""
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name == "reader":
            started.append(thread)
            if len(started) > 1:
                raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    average(save(tmp_path, mixed_run()), tmp_path / "mean.safetensors")
    assert len(started) == 2


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("readers", [0, 1, 5])
def test_the_bytes_do_not_depend_on_it(tmp_path: Path, readers: int) -> None:
    paths = save(tmp_path, mixed_run())
    average(paths, tmp_path / "plain.safetensors")
    average(paths, tmp_path / "found.safetensors", readers=readers)
    assert digest(tmp_path / "plain.safetensors") == digest(tmp_path / "found.safetensors")


def test_nothing_starts_once_all_is_over() -> None:
    """A worker that an interrupt has cut off from its pool may ask later: a reader would keep the process for ever."""
    loaded: list[tuple[str, int, int]] = []
    before = threading.active_count()
    with ReadAhead(2) as ahead:
        pass
    ahead.ask([spans((Recorded("a", loaded), 0, MiB))])
    assert threading.active_count() == before
    assert loaded == []
