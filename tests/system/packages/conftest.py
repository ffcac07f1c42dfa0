"""What is published: built once, as the README's reader would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from system.packages import uv

DATE = "1700000000"  # SOURCE_DATE_EPOCH


@dataclass(frozen=True)
class Archives:
    """The two files that an index gets."""

    sdist: Path
    wheel: Path


def build(sources: Path, folder: Path) -> Archives:
    """Builds the source distribution, and the wheel from it."""
    uv.tool("pyproject-build", "-o", folder, sources, package="build", SOURCE_DATE_EPOCH=DATE, CKPT_AVG_ENGINE="native")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Archives(sdist, wheel)


def empty_environment(folder: Path, *options: str) -> Path:
    """Makes an environment in which nothing is installed; returns its interpreter."""
    uv.run("venv", *options, folder / "venv")
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """The source distribution and the wheel of this tree."""
    return build(uv.ROOT, tmp_path_factory.mktemp("dist"))
