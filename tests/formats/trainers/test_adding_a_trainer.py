"""docs/adding-a-trainer.md, followed to the letter in a copy of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "adding-a-trainer.md").read_text()


@pytest.mark.slow
def test_a_trainer_added_as_the_page_says_is_read_as_the_page_says(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
    ignored = shutil.ignore_patterns("__pycache__")
    trainers = shutil.copytree(ROOT / "ckpt_avg", tmp_path / "ckpt_avg", ignore=ignored) / "formats" / "trainers"
    (trainers / "kestrel.py").write_text(blocks["trainer"])
    registry = (trainers / "registry.py").read_text()
    for line in ("    lightning,\n", "    lightning.TRAINER,\n"):
        assert registry.count(line) == 1
        registry = registry.replace(line, line.replace("lightning", "kestrel") + line)
    (trainers / "registry.py").write_text(registry)
    (tmp_path / "test_kestrel.py").write_text(blocks["test"])
    # The copy is imported, since "python -m" puts the current folder first.
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "."]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout
