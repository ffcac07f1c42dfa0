"""Loading the inputs while something else takes the time: what the mean reads first, in its order, and not for ever."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from mean.inputs import save

from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean import loading
from ckpt_avg.mean.value_kinds import plan_of


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What the system is asked for: file, first byte, bytes."""
    found: list[tuple[str, int, int]] = []

    def load(file: InputFile, offset: int, length: int) -> None:
        found.append((file.path.name, offset, length))

    monkeypatch.setattr(InputFile, "load", load)
    return found


def ask(folder: Path, wanted: int, asked: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Loads two checkpoints of two tensors of 8,000 bytes until the system was asked so often; returns for what."""
    states = [{"a": torch.zeros(2000), "b": torch.ones(2000)} for _ in range(2)]
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in save(folder, states)]
        begin = checkpoints[0].files[0].size - 16_000
        with loading.loading(checkpoints, plan_of(checkpoints, dtype="keep", non_float="last"), readers=16):
            deadline = time.monotonic() + 20
            while len(asked) < wanted and time.monotonic() < deadline:
                time.sleep(0.001)
    assert not [each for each in threading.enumerate() if each.name == "reader"]
    return [(name, offset - begin, length) for name, offset, length in asked]


def test_the_system_is_asked_for_all_in_the_order_of_the_mean(
    tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, each of all checkpoints. If it failed, the mean would wait for what the user's import hid."""
    monkeypatch.setattr(loading, "_REQUEST", 4096)
    monkeypatch.setattr(loading, "_READERS", 1)
    blocks = [(0, 4096), (4096, 4096), (8192, 4096), (12_288, 3712)]
    assert ask(tmp_path, 8, asked) == [(f"{k}.safetensors", *block) for block in blocks for k in range(2)]


@pytest.mark.parametrize(("most", "requests"), [(8192, 1024), (2**30, 2)], ids=["bytes", "requests"])
def test_the_page_cache_is_not_filled(
    tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch, most: int, requests: int
) -> None:
    """If it failed, an import that takes long would push out of memory what it has loaded first."""
    monkeypatch.setattr(loading, "_REQUEST", 4096)
    monkeypatch.setattr(loading, "_MOST", most)
    monkeypatch.setattr(loading, "_REQUESTS", requests)
    assert sorted(ask(tmp_path, 2, asked)) == [(f"{k}.safetensors", 0, 4096) for k in range(2)]
