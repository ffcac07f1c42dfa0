"""What the tests of faults share: who forks runs, and where these find inputs and leave outputs.

The processes of these tests are killed, starved and traced; measuring their coverage, too, would only slow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from system.faults.runs import Runs, shared_runs


@pytest.fixture(autouse=True, scope="module")
def _processes_without_coverage() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture(scope="module")
def runs() -> Runs:
    """Forks runs."""
    return shared_runs()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder for checkpoints, and for nothing else."""
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A path in another folder that holds nothing."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "mean.safetensors"
