"""Ultralytics: whole pickled modules, of which only the EMA is there during training."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
from formats.reading import assert_same, read
from layouts import save, throwaway
from torch import nn

from ckpt_avg import open_checkpoint


def test_it_is_said_that_the_weights_are_ema(tmp_path: Path) -> None:
    """``model`` is None during training: only the EMA module is there, in float16."""
    saved = layouts.ultralytics(tmp_path).checkpoints[0]
    with open_checkpoint(saved.path) as checkpoint, open_checkpoint(saved.path, ema=True) as same:
        assert any("EMA" in note for note in checkpoint.spec.notes)
        assert checkpoint.spec.tensors == same.spec.tensors
        assert ("again.weight", "model.2.1.weight") in [tuple(sorted(group)) for group in checkpoint.spec.tied()]


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
def test_after_training(tmp_path: Path, stream: bool) -> None:
    """strip_optimizer moves the module to ``model``, and sets the epoch to -1, which is none."""
    for saved in layouts.ultralytics(tmp_path, stripped=True, stream=stream).checkpoints:
        assert_same(read(saved.path), saved.raw)
        with open_checkpoint(saved.path) as checkpoint:
            assert checkpoint.spec.kind == "Ultralytics"
            assert checkpoint.spec.state_key == "model"
            assert checkpoint.spec.record.epoch != -1


def test_a_pickled_module_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    """Non-persistent buffers, absent parameters and plain attributes are no part of a state dict."""
    model = layouts.yolo(3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with throwaway("somewhere.models", Model=type("Model", (nn.Module,), {})) as module:
        model.__class__ = module.Model
        path = save(model, tmp_path / "whole.pt")
    assert_same(read(path), expected)
    assert "transient" not in expected
