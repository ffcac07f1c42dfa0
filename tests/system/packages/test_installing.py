"""Installing what is published, in empty environments, and running it there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from system.packages import uv
from system.packages.conftest import Archives, empty_environment
from system.packages.installed import DATA, FIXTURE, data_of

pytestmark = pytest.mark.packages

SCRIPT = Path(__file__).with_name("installed.py")
PAGE = (uv.ROOT / "docs" / "installing.md").read_text()
PYTHONS = range(10, 16)  # Python 3.10 and later


def works(python: Path, engine: str) -> None:
    """Runs the commands there, outside this environment and this folder."""
    done = subprocess.run(
        [python, "-I", SCRIPT, engine], cwd=python.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_each_archive_works_in_an_empty_environment(kind: str, archives: Archives, tmp_path: Path) -> None:
    python = empty_environment(tmp_path)
    uv.run("pip", "install", "--python", python, getattr(archives, kind))
    uv.run("pip", "check", "--python", python)
    works(python, "native")


def test_without_a_compiler_the_source_distribution_works_with_torch(archives: Archives, tmp_path: Path) -> None:
    python = empty_environment(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").symlink_to(uv.program())
    built = uv.run("build", "--wheel", "--python", python, "-o", tmp_path, archives.sdist, PATH=str(tools), CC="")
    assert "not compiled, so torch does the work, slower: there is no C compiler" in built
    uv.run("pip", "install", "--python", python, *tmp_path.glob("*.whl"))
    works(python, "torch")


@pytest.mark.parametrize("line", re.findall(r"^\$ ((?:pipx|uvx) .*?)(?:  +#.*)?$", PAGE, re.MULTILINE))
def test_it_runs_without_being_installed(line: str, archives: Archives, tmp_path: Path) -> None:
    """As docs/installing.md says, with the wheel in place of the sources."""
    output = tmp_path / "mean.safetensors"
    runner, *words = line.split()
    average = ["average", FIXTURE, "--last", "8", "--bn", "keep", "-o", output]
    arguments = [archives.wheel if word == "." else word for word in words if word != "--version"] + average
    if runner == "pipx":
        uv.tool("pipx", *arguments, PIPX_HOME=str(tmp_path))
    else:
        uv.run("tool", "run", "-c", uv.CONSTRAINTS, *arguments)
    assert data_of(output) == DATA


def test_trying_another_python_works_as_the_page_says(tmp_path: Path) -> None:
    """With pip, from the sources."""
    (block,) = re.findall(r"^```console\n(\$ PYTHON .*?)```", PAGE, re.MULTILINE | re.DOTALL)
    script = re.sub(r"^\$ ", "", block, flags=re.MULTILINE).replace("PYTHON", sys.executable)
    script = script.replace("new", str(tmp_path / "new"))
    done = subprocess.run(["bash", "-ec", script], cwd=uv.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": works\n")


def interpreter(minor: int) -> str | None:
    """Returns a Python 3.MINOR of this machine that starts: of the path, or of pyenv."""
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"3.{minor}.*/bin/{name}")
    for candidate in (shutil.which(name), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


@pytest.mark.parametrize("minor", PYTHONS)
def test_what_needs_no_torch_works_on_each_python(minor: int, archives: Archives, tmp_path: Path) -> None:
    """The wheel for the stable ABI from Python 3.11 on; before, one that is compiled for it."""
    found = interpreter(minor)
    if found is None:
        pytest.skip(f"there is no Python 3.{minor} on this machine")
    python = empty_environment(tmp_path, "--python", found)
    uv.run("pip", "install", "--python", python, "click", "tqdm")
    wheel = archives.wheel
    if minor < 11:
        uv.run("build", "--wheel", "--python", python, "-o", tmp_path, archives.sdist, CKPT_AVG_ENGINE="native")
        (wheel,) = tmp_path.glob("*.whl")
    uv.run("pip", "install", "--python", python, "--no-deps", wheel)
    works(python, "native")
