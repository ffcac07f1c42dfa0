"""What pyproject.toml and CITATION.cff state, checked by the tools that read them."""

from __future__ import annotations

import pytest
from system.packages import uv

pytestmark = pytest.mark.packages


def test_the_citation_file_is_valid() -> None:
    uv.tool("cffconvert", "--validate", "-i", "CITATION.cff")


@pytest.mark.parametrize(("platform", "arch"), [("linux", "x86_64"), ("linux", "aarch64"), ("macos", "arm64")])
def test_cibuildwheel_would_build_two_wheels_for_each_system(platform: str, arch: str) -> None:
    system = "manylinux" if platform == "linux" else "macosx"
    planned = uv.tool("cibuildwheel", "--print-build-identifiers", "--platform", platform, "--archs", arch)
    assert planned.split() == [f"cp310-{system}_{arch}", f"cp311-{system}_{arch}"]


def test_no_syntax_or_library_newer_than_the_oldest_python_is_used() -> None:
    uv.tool("vermin", "--no-tips", "--violations", "-t=3.10-", "ckpt_avg", "hatch_build.py")
