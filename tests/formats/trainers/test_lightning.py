"""Lightning: the scores of its callbacks, and the names of a LightningModule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from formats.reading import assert_same, read, refusal
from layouts import ordered, save, state

from ckpt_avg import open_checkpoint


def test_the_score_of_this_checkpoint_and_not_of_others(tmp_path: Path) -> None:
    callbacks = {
        "ModelCheckpoint{'monitor': 'val'}": {
            "monitor": "val",
            "current_score": torch.tensor(0.25),
            "best_k_models": {},
        },
        "EarlyStopping": {"monitor": "x", "current_score": 9.0},
    }
    contents = {"state_dict": state(1), "pytorch-lightning_version": "2.5", "global_step": 7, "epoch": 1}
    with open_checkpoint(save({**contents, "callbacks": callbacks}, tmp_path / "a.ckpt")) as checkpoint:
        record = checkpoint.spec.record
    assert (record.step, record.epoch, dict(record.metrics)) == (7, 1, {"val": 0.25})


@pytest.mark.parametrize("prefix", ["model.", "model"])
def test_a_prefix_that_the_user_names(tmp_path: Path, prefix: str) -> None:
    """A LightningModule keeps the network in an attribute of its own."""
    path = save({"state_dict": ordered(state(1), "model.")}, tmp_path / "a.ckpt")
    assert_same(read(path, strip_prefix=prefix), state(1))
    assert_same(read(path), ordered(state(1), "model."))
    assert "--strip-prefix" in refusal(path, strip_prefix="backbone.")
