"""The resident set of the whole process must not grow with the model or with the number of checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks.harness import ckpt_avg, run
from benchmarks.inputs import layout, write_sparse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures the peak resident set as Linux counts it")


def _peak(folder: Path, nbytes: int, count: int) -> float:
    inputs = folder / f"{nbytes}-{count}"
    inputs.mkdir()
    for index in range(count):
        write_sparse(inputs / f"step_{index}.safetensors", layout(nbytes))
    output = inputs / "out.safetensors"
    peak = run(ckpt_avg(*inputs.iterdir(), "-o", output, "--threads", 2)).peak  # in a folder, equal ones count once
    output.unlink()
    return peak


@pytest.mark.slow
@pytest.mark.guarantee("flat-memory")
def test_flat_in_checkpoints_and_in_size(tmp_path: Path) -> None:
    """Whole models, or one window for each checkpoint whatever their number, would show at once."""
    peaks = {
        (size, count): _peak(tmp_path, size * 2**20, count) for size, count in ((128, 2), (128, 8), (128, 32), (512, 2))
    }
    assert max(peaks.values()) < 600, peaks
    assert max(peaks.values()) < 1.08 * min(peaks.values()), peaks
