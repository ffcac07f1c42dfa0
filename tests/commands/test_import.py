"""The user's code that the command line names: imported once, when the checkpoints are checked and are being loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import NET, trained, write_module
from recorded import Recorded

from ckpt_avg import UsageError, average, soup, sweep
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.user_code.load import Reference


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of a network with BatchNorm."""
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(3):
        torch.save(trained(number), folder / f"step_{number}.pt")
    return folder


def code(folder: Path, source: str = NET) -> dict[str, Any]:
    """References to a new module."""
    module = write_module(folder, source)
    return {
        "model": Reference(f"{module}:make", "--model", folder),
        "data": Reference(f"{module}:data", "--data", folder),
        "evaluate": [Reference(f"{module}:score", "--eval", folder)],
        "device": "cpu",
    }


@pytest.mark.parametrize("command", [soup, sweep])
def test_the_code_is_imported_once_however_often_it_is_used(run: Path, tmp_path: Path, command: Any) -> None:
    """The soup that was chosen is averaged like another run; a module may make a new loader for each look at it."""
    looks = (
        "def __getattr__(name):\n    if name != 'found':\n        raise AttributeError(name)\n    looked.append(1)\n"
    )
    module = write_module(tmp_path, f"{NET}\nlooked = []\n{looks}    assert len(looked) == 1\n    return data\n")
    options = code(tmp_path) | {"data": Reference(f"{module}:found", "--data", tmp_path), "minimize": "loss"}
    recorded = Recorded()
    output = [tmp_path / "soup.safetensors"] if command is soup else []
    command(run, *output, progress=recorded.progress, **options)
    titles = [phase.title for phase in recorded.phases]
    assert [title.partition(" ")[0] for title in titles[:2]] == ["opening", "importing"]
    assert len([title for title in titles if title.startswith("importing")]) == 1


@pytest.mark.parametrize(
    ("options", "loads"), [({}, True), ({"readers": 0}, False), ({"dry_run": True}, False)], ids=["", "none", "dry"]
)
def test_the_inputs_are_loaded_meanwhile_if_they_will_be_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], loads: bool
) -> None:
    """A dry run that fills the page cache pushes out what other programs need."""
    asked: list[str] = []

    def load(file: InputFile, offset: int, length: int) -> None:
        asked.append(file.path.name)

    monkeypatch.setattr(InputFile, "load", load)
    late = f"import time\ntime.sleep(0.2)\n{NET}\nraise LookupError('not found')\n"
    with pytest.raises(Exception, match="not found"):
        average(run, tmp_path / "swa.safetensors", **code(tmp_path, late), **options)
    assert set(asked) == ({"step_0.pt", "step_1.pt", "step_2.pt"} if loads else set())


def test_a_run_that_goes_on_has_the_same_forward_batch(run: Path, tmp_path: Path) -> None:
    """It changes the statistics: if it failed, numbers of two kinds of refresh would stand in one table."""
    options: dict[str, Any] = {"minimize": "loss", "resume": tmp_path / "sweep.json"}
    sweep(run, **code(tmp_path), **options)
    other = f"{NET}\ndef forward_batch(model, batch):\n    model(2 * batch)\n"
    with pytest.raises(UsageError, match="forward-batch"):
        sweep(run, **code(tmp_path, other), **options)
