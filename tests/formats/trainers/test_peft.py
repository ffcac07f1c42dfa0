"""PEFT: adapters open with a note."""

from __future__ import annotations

from pathlib import Path

import layouts
from formats.reading import assert_same, read

from ckpt_avg import open_checkpoint


def test_the_mean_of_factors_is_not_the_factors_of_the_mean(tmp_path: Path) -> None:
    weights = layouts.peft(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_same(read(path), weights)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec.kind == "PEFT adapter"
            assert any("LoRA" in note for note in checkpoint.spec.notes)
