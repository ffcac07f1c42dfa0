"""How many phases follow is right in every phase, whatever the options: the last one is the last of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import data, make, score, trained
from recorded import Recorded
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ckpt_avg import average, compare, refresh_weights, soup, sweep, verify

MEASURED = {"model": make, "data": data, "evaluate": score, "device": "cpu"}
KEPT = {"model": make, "bn": "keep", "evaluate": score, "device": "cpu"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(3):
        torch.save({"model": trained(number), "step": number}, folder / f"step_{number}.pt")
    return folder


def assert_counted_down(recorded: Recorded) -> None:
    """Once it is known how many phases follow, it is one less in each phase."""
    left = [phase.left for phase in recorded.phases if phase.left is not None]
    assert left == list(range(len(left)))[::-1], [(phase.title, phase.left) for phase in recorded.phases]
    assert len(left) >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"bn": "keep"},
        {"bn": "keep", "sha256": True},
        {"bn": "keep", "last": 1},
        {"bn": "keep", "max_shard_size": 1000},
        {"bn": "keep", "max_shard_size": 1000, "sha256": True},
        {"model": make, "data": data, "device": "cpu"},
        KEPT,
        {**KEPT, "evaluate_all": True},
        MEASURED,
        {**MEASURED, "evaluate_all": True, "eval_repeats": 2, "sha256": True},
        {**MEASURED, "last": 1, "bn": "refresh"},
        {**MEASURED, "require": "loss<=mean+1e9"},
    ],
    ids=str,
)
def test_average(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    output = f"{tmp_path}/out/" if "max_shard_size" in options else tmp_path / "out.safetensors"
    recorded = Recorded()
    average(run, output, progress=recorded.progress, **options)
    assert_counted_down(recorded)


def test_average_with_spectral_norm(tmp_path: Path) -> None:
    paths = [tmp_path / f"step_{number}.pt" for number in range(2)]
    for path in paths:
        torch.save(spectral_norm(nn.Linear(3, 2)).state_dict(), path)
    recorded = Recorded()
    average(paths, tmp_path / "out.safetensors", progress=recorded.progress)
    assert_counted_down(recorded)
    assert "computing spectral norm of 1 weight" in [phase.title for phase in recorded.phases]


@pytest.mark.parametrize("options", [{}, {"evaluate": score}], ids=["plain", "measured"])
def test_refresh_weights(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recorded = Recorded()
    given = {"model": make, "data": data, "device": "cpu", **options}
    refresh_weights(run / "step_1.pt", tmp_path / "out.safetensors", progress=recorded.progress, **given)
    assert_counted_down(recorded)


@pytest.mark.parametrize("options", [MEASURED, KEPT], ids=["refreshed", "kept"])
def test_sweep_and_soup(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    swept, made = Recorded(), Recorded()
    sweep(run, minimize="loss", progress=swept.progress, **options)
    assert_counted_down(swept)
    soup(run, tmp_path / "out.safetensors", minimize="loss", sha256=True, progress=made.progress, **options)
    assert_counted_down(made)


def test_verify_and_compare(run: Path, tmp_path: Path) -> None:
    average(run, tmp_path / "out.safetensors", bn="keep")
    for sources in (None, run):
        recorded = Recorded()
        verify(tmp_path / "out.safetensors", sources=sources, progress=recorded.progress)
        assert_counted_down(recorded)
    recorded = Recorded()
    compare(run, progress=recorded.progress)
    assert_counted_down(recorded)
