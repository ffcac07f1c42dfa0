"""`progress=True`: lines on stderr, or bars in a notebook."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

import ckpt_avg


@pytest.mark.python_words
def test_progress_on_request_shows_notices_on_stderr(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it nothing is printed: a library must be silent unless it is asked."""
    ckpt_avg.average(run_folder, tmp_path / "a.safetensors", last=2, bn="keep")
    ckpt_avg.average(run_folder, tmp_path / "b.safetensors", last=2, bn="keep", progress=False)
    assert capsys.readouterr() == ("", "")
    result = ckpt_avg.average(run_folder, tmp_path / "c.safetensors", last=2, bn="keep", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"Notice: {text}" for text in result.notices]


def test_a_notebook_has_a_bar_for_each_phase(
    run_folder: Path, tmp_path: Path, train: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its title, its total, and all of it done at the end; no bar is left open, even after an error."""
    bars: list[Bar] = []

    class Bar:
        def __init__(self, desc: str, total: int | None, unit: str, unit_scale: bool) -> None:
            self.desc, self.total, self.unit, self.done, self.is_open = desc, total, unit, 0, True
            bars.append(self)

        def update(self, amount: int) -> None:
            self.done += amount

        def reset(self, total: int) -> None:
            self.total, self.done = total, 0

        def set_postfix_str(self, text: str) -> None:
            pass

        def close(self) -> None:
            self.is_open = False

    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    ckpt_avg.average(run_folder, tmp_path / "a.safetensors", last=2, bn="keep", progress=True)
    assert [bar.desc.split()[0] for bar in bars][:2] == ["opening", "averaging"]
    averaging = bars[1]
    assert averaging.unit == "B"
    assert averaging.total == averaging.done > 100_000
    bars.clear()
    options = {"model": train.make_model, "data": [torch.zeros(4, 1, 28, 28)] * 3, "evaluate": lambda model: 1.0}
    ckpt_avg.sweep(run_folder, last=2, maximize="<lambda>", progress=True, **options)
    assert [(bar.desc, bar.unit, bar.done, bar.total) for bar in bars if bar.done != bar.total and bar.total] == []
    assert any(bar.total == 3 and "windows" in bar.unit for bar in bars)
    with pytest.raises(ckpt_avg.OutputError):
        ckpt_avg.average(run_folder, tmp_path / "a.safetensors", last=2, bn="keep", progress=True)
    assert not any(bar.is_open for bar in bars)
