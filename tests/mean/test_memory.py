"""The resident set of the whole process must not grow with the model or with the number of checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from benchmarks.harness import ckpt_avg, run
from benchmarks.inputs import layout, write_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures the peak resident set as Linux counts it")

KEEPS = """
from ckpt_avg.checkpoint.tensor_reads import read_bytes
from ckpt_avg.mean.native import NativeEngine
kept, real = [], NativeEngine.read
def read(self, block, indices):
    real(self, block, indices)
    kept.extend(read_bytes(each, block.stored_in(each)) for each in (self._checkpoints[i] for i in indices))
NativeEngine.read = read
"""


def peaks(
    folder: Path, cases: Iterable[tuple[int, int]], *, more: str = "", compare: bool = False
) -> dict[tuple[int, int], float]:
    """Returns the peak in MiB for each size of a checkpoint, in MiB, and number of checkpoints; ``more`` runs first."""
    (folder / "sitecustomize.py").write_text(more)
    found = {}
    for size, count in cases:
        paths = write_run(folder / f"{size}-{count}", layout(size * 2**20), count)
        output = folder / "out.safetensors"
        command = ckpt_avg(*paths, "-o", output, "--threads", 2)
        if compare:
            command = [sys.executable, "-m", "ckpt_avg", "compare", "-q", *map(str, paths), "--threads", "2"]
        found[size, count] = run(["/usr/bin/env", f"PYTHONPATH={folder}", *command]).peak
        output.unlink(missing_ok=compare)
    print(found)
    return found


def is_flat(found: dict[tuple[int, int], float]) -> bool:
    return max(found.values()) < 1.08 * min(found.values())


@pytest.mark.slow
@pytest.mark.guarantee("flat-memory")
def test_flat_in_checkpoints_and_in_size(tmp_path: Path) -> None:
    """Whole models, or one window for each checkpoint whatever their number, would show at once."""
    found = peaks(tmp_path, [(128, 2), (128, 8), (128, 32), (512, 2)])
    assert max(found.values()) < 600
    assert is_flat(found)


@pytest.mark.slow
def test_compare_is_flat_too(tmp_path: Path) -> None:
    """It holds products of each two checkpoints, which are small, and no tensors."""
    assert is_flat(peaks(tmp_path, [(64, 2), (64, 16), (256, 2)], compare=True))


@pytest.mark.slow
@pytest.mark.guarantee("flat-memory")
def test_the_measure_catches_a_reader_that_keeps_what_it_read(tmp_path: Path) -> None:
    """A control: inputs that stay in memory show in the peak."""
    assert not is_flat(peaks(tmp_path, [(64, 2), (64, 6)], more=KEEPS))


@pytest.mark.campaign
@pytest.mark.guarantee("flat-memory")
def test_flat_up_to_large_models_and_many_checkpoints(tmp_path: Path) -> None:
    """If it failed, some model would be too large for a machine on which a smaller one is averaged."""
    assert is_flat(peaks(tmp_path, [(256, 2), (256, 8), (256, 32), (1024, 2), (1024, 8), (4096, 2)]))
