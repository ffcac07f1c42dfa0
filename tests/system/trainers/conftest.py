"""Trains once with every library that is installed."""

from __future__ import annotations

import pytest
from system.trainers.runs import Run, Trainers


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Trainers:
    """Gives runs by name."""
    return Trainers(tmp_path_factory.mktemp("trainers"))


@pytest.fixture
def run(request: pytest.FixtureRequest, trainers: Trainers) -> Run:
    """The run that a test is for: its (indirect) parameter is the name."""
    return trainers.run(request.param)
