"""The benchmarks still run: names of the package in their programs go stale silently."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def printed(*command: object) -> str:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True).stdout


def test_sections_run(tmp_path: Path) -> None:
    """All but those that only repeat others with more processes."""
    names = ("warm", "profile", "cold", "engines", "formats", "tensors", "memory", "peers", "llama")
    tiny = ("--gigabytes", 0.002, "--checkpoints", 2, "--rounds", 1, "--folder", tmp_path)
    out = printed(BENCHMARKS / "run.py", "--only", ",".join(names), *tiny)
    assert out.count("\n## ") == len(names)
    assert "| like timm" in out
    assert "| `inspect`" in out


def test_the_refresh_runs() -> None:
    out = printed(BENCHMARKS / "refresh.py", "--rounds", 1, "--batches", 2, "--samples", 2, "--size", 32)
    assert out.count("| ckpt-avg, pooled |") == 2
