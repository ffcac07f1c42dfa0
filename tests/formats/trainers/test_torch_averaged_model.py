"""torch's AveragedModel: its weights are read and known as an average."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats.reading import Command, assert_same, mean, read
from layouts import net, save, state
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from ckpt_avg import open_checkpoint


@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("buffers", [False, True])
def test_it_is_known_as_an_average(tmp_path: Path, key: str | None, buffers: bool) -> None:
    """The counter is averaged as a weight, or the names don't load into the model."""
    average = AveragedModel(net(4), use_buffers=buffers)
    average.update_parameters(net(4))
    contents = average.state_dict()
    assert "n_averaged" in contents
    path = save(contents if key is None else {key: contents, "epoch": 1}, tmp_path / "swa.pt")
    assert_same(read(path), state(4))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.prefix == "module."
        assert checkpoint.spec.averaged
        assert checkpoint.spec.kind == "torch AveragedModel"


def test_an_average_among_the_inputs_is_said(tmp_path: Path, in_process: Command) -> None:
    paths = [save(net(1).state_dict(), tmp_path / "a.pt"), save(AveragedModel(net(2)).state_dict(), tmp_path / "b.pt")]
    out = tmp_path / "o.safetensors"
    code, _, errors = in_process("average", *paths, "-o", out, "--bn", "keep")
    assert code == 0, errors
    assert "b.pt" in errors
    assert "average" in errors
    assert_same(load_file(out), mean([state(1), state(2)]))
