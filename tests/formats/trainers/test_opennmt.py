"""OpenNMT-py with safetensors: the weights are apart, and the .pt file of the same name has everything else."""

from __future__ import annotations

from pathlib import Path

from formats.reading import Command, listed, names
from layouts import adam, save, state
from safetensors.torch import save_file


def test_opennmt_with_safetensors(tmp_path: Path, in_process: Command) -> None:
    steps = [5000, 10000, 100000]
    for step in steps:
        rest = {"vocab": {"src": ["a"]}, "opt": None, "optim": {"training_step": step + 1, "optimizer": adam()}}
        save(rest, tmp_path / f"model_step_{step}.pt")
        save_file(state(step // 5000), tmp_path / f"model_step_{step}.safetensors")
    shown = listed(in_process, tmp_path)
    assert names(shown["checkpoints"]) == [f"model_step_{step}.safetensors" for step in steps]
    assert [entry["step"] for entry in shown["checkpoints"]] == steps
