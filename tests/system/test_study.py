"""The study's script runs, from training to its tables and its picture, with runs of a few steps."""

import importlib
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "docs" / "study"


@pytest.mark.slow
def test_the_language_model_is_trained_averaged_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study of weights could not be repeated: its script is run by nobody else."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [str(STUDY), str(STUDY.parents[1] / "fixtures" / "mnist_cnn"), *sys.path])
    language = importlib.import_module("language")
    weightings = importlib.import_module("weightings")
    for name, value in {"STEPS": 24, "INTERVAL": 2, "WINDOWS": (8, 16), "WARMUP": 4, "HELD_OUT": 20}.items():
        monkeypatch.setattr(language, name, value)
    seeds = [weightings.measured(tmp_path, "language", seed, weightings.measure_language) for seed in range(2)]
    last = 0.0
    for window, losses in seeds[0].items():
        assert set(losses) == {weightings.LAST, *weightings.WEIGHTINGS, "decayed rate, 1-sqrt", "decayed rate, linear"}
        assert len(set(losses.values())) == len(losses)  # each is an average, or a run, of its own
        last = losses[weightings.LAST]
        assert losses["mean"] != last
        table = weightings.language_table(seeds, window)
        assert table.count("\n") == len(losses) + 1
    assert seeds[0]["8"][weightings.LAST] == last == seeds[0]["16"][weightings.LAST]
    scores = {key: {"accuracy": 0.5, "loss": 1.0} for key in (*weightings.WEIGHTINGS, weightings.SOUP)}
    weightings.draw(tmp_path / "plots", [scores, scores], seeds)
    assert (tmp_path / "plots" / "weightings.png").stat().st_size > 10_000
