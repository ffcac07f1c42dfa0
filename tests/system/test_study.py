"""The study's tables come from its data, its pictures are up to date, and its script on weights runs."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUDY = Path(__file__).parents[2] / "docs" / "study"
SHORT = """
import sys
from pathlib import Path
import language
import weightings
language.STEPS, language.INTERVAL, language.WINDOWS, language.WARMUP, language.HELD_OUT = 24, 2, (8, 16), 4, 20
work = Path(sys.argv[1])
seeds = [weightings.measured(work, "language", seed, weightings.measure_language) for seed in range(2)]
print(weightings.language_table(seeds, "8"))
"""
TABLES = """
import json
import choices
import weightings
data = json.loads(weightings.DATA.read_text())
print(weightings.digits_table(data["fixture run"]))
print(weightings.language_table(data["language model"], "400"))
print(weightings.language_table(data["language model"], "800"))
print(weightings.digits_table(json.loads(choices.DATA.read_text()), choices.REFERENCE))
"""


def _run(code: str, folder: Path) -> str:
    """Runs code beside the study's scripts, and returns what it prints."""
    path = os.pathsep.join(map(str, (STUDY, STUDY.parents[1] / "fixtures" / "mnist_cnn")))
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _pictures() -> ModuleType:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(STUDY))
    try:
        return importlib.import_module("pictures")
    finally:
        sys.path.remove(str(STUDY))


def test_pictures_are_up_to_date() -> None:
    """A picture would show other numbers than the page, or an older drawing. Draw it: python docs/study/pictures.py"""
    pictures = _pictures()
    for picture in pictures.PICTURES:
        assert pictures.recorded(picture.path) == picture.digest, picture.path


def test_every_picture_of_the_pages_is_drawn_by_the_script() -> None:
    """One that nobody can draw again would never be out of date."""
    drawn = {picture.path for picture in _pictures().PICTURES}
    shown = {
        (page.parent / path).resolve()
        for page in (*STUDY.parent.glob("*.md"), STUDY.parents[1] / "README.md")
        for path in re.findall(r"\]\(([^)#:]+\.png)\)", page.read_text())
    }
    assert shown == drawn


def test_a_change_of_numbers_or_code_outdates_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = _pictures()
    page = tmp_path / "study.md"
    page.write_text(pictures.PAGE.read_text().replace("99.09 ± 0.30", "99.08 ± 0.30", 1))
    before = {picture.path.stem: picture.digest for picture in pictures.PICTURES}
    monkeypatch.setattr(pictures, "PAGE", page)
    changed = {name for name, digest in before.items() if digest != _digests(pictures)[name]}
    assert changed == {"scores", "limit", "rays", "lines"}
    monkeypatch.setattr(pictures, "_code", lambda: [b"other code"])
    changed = {name for name, digest in before.items() if digest != _digests(pictures)[name]}
    assert changed == set(before) - {"comparing", "sweep"}  # the commands draw these


def _digests(pictures: ModuleType) -> dict[str, str]:
    return {picture.path.stem: picture.digest for picture in pictures.PICTURES}


@pytest.mark.slow
def test_tables_are_those_of_the_scores(tmp_path: Path) -> None:
    """The page and its pictures would tell different stories."""
    page = (STUDY.parent / "study.md").read_text()
    for row in _run(TABLES, tmp_path).splitlines():
        assert row in page or set(row) <= set("| -"), row


@pytest.mark.slow
def test_the_language_model_is_trained_averaged_and_compared(tmp_path: Path) -> None:
    """The study of weights could not be repeated: its script is run by nobody else."""
    printed = _run(SHORT, tmp_path)
    windows = json.loads((tmp_path / "language_0.json").read_text())
    for losses in windows.values():
        assert {"last checkpoint", "mean", "minus-sqrt", "power, width 0.1", "decayed rate, linear"} <= set(losses)
        assert len(set(losses.values())) == len(losses) == 11  # each is an average, or a run, of its own
    assert windows["8"]["last checkpoint"] == windows["16"]["last checkpoint"]
    assert printed.count("\n") == 2 + 11
