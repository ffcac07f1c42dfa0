"""The source distribution and the wheel: what they contain, and that anyone can build the same bytes."""

from __future__ import annotations

import email
import hashlib
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from system.packages import uv
from system.packages.conftest import Archives, build

pytestmark = pytest.mark.packages

PACKAGED = ("ckpt_avg", "docs", "fixtures", "tests")
ALONE = {"hatch_build.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", ".gitignore"}


def tracked() -> set[str]:
    """The files of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=uv.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this tree is no git repository")
    return {name for name in done.stdout.splitlines() if (uv.ROOT / name).exists()}


def test_the_source_distribution_has_the_files_of_the_repository_and_no_others(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as archive:
        names = [member.name for member in archive if not member.isdir()]
    folder = archives.sdist.name.removesuffix(".tar.gz")
    assert {name.partition("/")[0] for name in names} == {folder}
    files = {name.partition("/")[2] for name in names}
    expected = {name for name in tracked() if name.partition("/")[0] in PACKAGED} | ALONE
    assert files == expected | {"PKG-INFO"}


def test_the_wheel_has_the_package_the_kernel_and_the_licence_and_nothing_else(archives: Archives) -> None:
    names = set(zipfile.ZipFile(archives.wheel).namelist())
    sources = {name for name in tracked() if name.startswith("ckpt_avg/")}
    assert {"ckpt_avg/py.typed", "ckpt_avg/mean/kernel.c"} <= sources <= names
    (kernel,) = {name for name in names - sources if name.startswith("ckpt_avg/")}
    assert kernel.startswith("ckpt_avg/_kernel.")
    others = {name.partition("/")[2] for name in names - sources - {kernel}}
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_a_second_build_from_the_source_distribution_has_the_same_bytes(archives: Archives, tmp_path: Path) -> None:
    with tarfile.open(archives.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (sources,) = tmp_path.iterdir()
    again = build(sources, tmp_path / "again")
    for first, second in ((archives.sdist, again.sdist), (archives.wheel, again.wheel)):
        assert first.name == second.name
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
        assert digests[0] == digests[1], first.name


def test_an_index_accepts_both_and_renders_the_readme(archives: Archives) -> None:
    uv.tool("twine", "check", "--strict", archives.sdist, archives.wheel)
    uv.tool("check-wheel-contents", archives.wheel)


def test_the_metadata_state_what_the_project_file_states(archives: Archives) -> None:
    (name,) = (name for name in zipfile.ZipFile(archives.wheel).namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(zipfile.ZipFile(archives.wheel).read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.partition(">")[0] for line in required} == {"torch", "safetensors", "click", "tqdm"}
    assert all(">=" in line and "<" not in line for line in required)
