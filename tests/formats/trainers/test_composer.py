"""Composer: its EMA algorithm saves the average as the model."""

from __future__ import annotations

from pathlib import Path

import layouts
from formats.reading import assert_same, read

from ckpt_avg import open_checkpoint


def test_the_average_in_place_of_the_model_is_known(tmp_path: Path) -> None:
    for saved in layouts.composer(tmp_path, ema=True).checkpoints:
        assert saved.ema is not None
        assert_same(read(saved.path, ema=True), saved.ema)
        assert_same(read(saved.path), saved.ema)
        with open_checkpoint(saved.path) as checkpoint:
            assert any("EMA" in note for note in checkpoint.spec.notes)
            assert (checkpoint.spec.kind, bool(checkpoint.spec.averaged)) == ("Composer", True)
