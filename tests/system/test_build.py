"""Building: the wheel has the native engine where a C compiler is found, and is a plain one where none is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")]


def build(folder: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Builds a wheel into a folder; variables that are None are unset."""
    pytest.importorskip("hatchling.build")
    merged = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-c", "import sys, hatchling.build as b; b.build_wheel(sys.argv[1])", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=merged, capture_output=True, text=True, timeout=120, check=False)


def version_of(wheel: Path) -> str:
    """Returns what the command of a wheel says of its version and engine."""
    installed = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    command = [sys.executable, "-m", "ckpt_avg", "--version"]
    environment = os.environ | {"PYTHONPATH": str(installed), "CKPT_AVG_ENGINE": ""}
    return subprocess.run(command, cwd=wheel.parent, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_wheel_has_the_kernel_and_the_tags_of_its_system(tmp_path: Path) -> None:
    done = build(tmp_path, CKPT_AVG_ENGINE="native")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = "cp311-abi3" if sys.version_info >= (3, 11) else r"cp310-cp310"
    assert re.search(rf"-{python}-(?!any)\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.fullmatch(r"ckpt_avg/_kernel\.\S+\.so", name)]
    assert version_of(wheel).endswith("native engine\n")


def test_without_a_compiler_the_wheel_is_a_plain_one(tmp_path: Path) -> None:
    """Installing must not fail; only who asks for the kernel is told that there is none."""
    done = build(tmp_path, PATH=str(tmp_path), CC=None, CKPT_AVG_ENGINE=None)
    assert done.returncode == 0, done.stderr
    assert "torch does the work, slower: there is no C compiler" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert version_of(wheel).endswith("torch engine\n")
    done = build(tmp_path, PATH=str(tmp_path), CC=None, CKPT_AVG_ENGINE="native")
    assert done.returncode != 0
    assert "mean/kernel.c: not compiled: there is no C compiler" in done.stderr


def test_a_compiler_that_fails_is_no_failure(tmp_path: Path) -> None:
    """As where the headers of Python are missing."""
    done = build(tmp_path, CFLAGS="-no-such-flag", CKPT_AVG_ENGINE=None)
    assert done.returncode == 0, done.stderr
    assert [wheel.name.endswith("-py3-none-any.whl") for wheel in tmp_path.glob("*.whl")] == [True]
