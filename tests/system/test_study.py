"""The study's script on weights runs, from training to its tables and its picture, with runs of a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
scores = {name: {"accuracy": 0.5, "loss": 1.0} for name in (*weightings.WEIGHTINGS, weightings.SOUP)}
weightings.draw(work, [scores, scores], seeds)
"""


@pytest.mark.slow
def test_the_language_model_is_trained_averaged_and_compared(tmp_path: Path) -> None:
    """The study of weights could not be repeated: its script is run by nobody else."""
    pytest.importorskip("matplotlib")
    path = os.pathsep.join(map(str, (STUDY, STUDY.parents[1] / "fixtures" / "mnist_cnn")))
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    windows = json.loads((tmp_path / "language_0.json").read_text())
    for losses in windows.values():
        assert {"last checkpoint", "mean", "minus-sqrt", "power, width 0.1", "decayed rate, linear"} <= set(losses)
        assert len(set(losses.values())) == len(losses) == 11  # each is an average, or a run, of its own
    assert windows["8"]["last checkpoint"] == windows["16"]["last checkpoint"]
    assert done.stdout.count("\n") == 2 + 11
    assert (tmp_path / "weightings.png").stat().st_size > 10_000
