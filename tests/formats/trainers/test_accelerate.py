"""Accelerate: folders that are numbered by saving, without a step."""

from __future__ import annotations

from pathlib import Path

import layouts
from formats.reading import Command, assert_same, listed, names, read


def test_accelerate(tmp_path: Path, in_process: Command) -> None:
    run = layouts.accelerate(tmp_path)
    for saved in run.checkpoints:
        assert_same(read(saved.path), saved.raw)
    shown = listed(in_process, tmp_path)
    assert names(shown["checkpoints"]) == ["checkpoint_0", "checkpoint_1", "checkpoint_10"]
    assert {entry["kind"] for entry in shown["checkpoints"]} == {"Accelerate"}
