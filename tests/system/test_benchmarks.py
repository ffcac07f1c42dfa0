"""The benchmarks still run: names of the package in their programs go stale silently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def printed(*command: object) -> str:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True).stdout


def test_a_section_of_each_script_runs(tmp_path: Path) -> None:
    tiny = ("--gigabytes", 0.001, "--checkpoints", 2, "--rounds", 1, "--folder", tmp_path)
    out = printed(BENCHMARKS / "run.py", "--only", "warm", *tiny)
    assert "elements of ckpt-avg's output is the float64 mean, rounded" in out
    out = printed(BENCHMARKS / "refresh.py", "--only", "accuracy", "--batches", 2, "--samples", 2, "--size", 32)
    assert "| ckpt_avg, pooled |" in out


def test_the_steps_before_the_first_byte_are_measured(tmp_path: Path) -> None:
    from benchmarks.inputs import many, write_run
    from benchmarks.scale import _PHASES

    paths = write_run(tmp_path / "run", many(3, 4096), 2)
    assert len(json.loads(printed("-c", _PHASES, tmp_path / "run"))) == 6
    assert len(printed(BENCHMARKS / "programs.py", "first_byte", tmp_path / "out", *paths).split()) == 2
