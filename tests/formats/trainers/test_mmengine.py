"""mmengine: by epoch and by iteration, with and without EMAHook, which swaps the weights."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
from formats.reading import Command, check_saved, listed, names

from ckpt_avg import open_checkpoint


@pytest.mark.parametrize("by_epoch", [True, False], ids=["by epoch", "by iteration"])
@pytest.mark.parametrize("ema", [False, True], ids=["raw", "EMAHook"])
def test_mmengine(tmp_path: Path, in_process: Command, by_epoch: bool, ema: bool) -> None:
    run = layouts.mmengine(tmp_path, ema=ema, by_epoch=by_epoch)
    for saved in run.checkpoints:
        check_saved(saved, "mmengine")
        with open_checkpoint(saved.path) as checkpoint:
            assert checkpoint.spec.record.metrics == saved.metrics
    shown = listed(in_process, run.folder)
    assert names(shown["checkpoints"]) == [saved.path.name for saved in run.checkpoints]
