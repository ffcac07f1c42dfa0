"""PEFT: adapters open with a note."""

from __future__ import annotations

import json
from pathlib import Path

import layouts
import pytest
from formats.reading import assert_same, read

from ckpt_avg import IncompatibleError, average, check, open_checkpoint


def test_the_mean_of_factors_is_not_the_factors_of_the_mean(tmp_path: Path) -> None:
    weights = layouts.peft(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_same(read(path), weights)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec.kind == "PEFT adapter"
            assert any("LoRA" in note for note in checkpoint.spec.notes)


@pytest.mark.parametrize("form", ["folders", "files"])
@pytest.mark.parametrize(
    ("key", "other"), [("lora_alpha", 8), ("use_rslora", True), ("r", 4), ("alpha_pattern", {"q_proj": 8})]
)
def test_adapters_of_different_scales_are_not_averaged(tmp_path: Path, key: str, other: object, form: str) -> None:
    """The factors are then multiplied by different numbers, of which the files say nothing."""
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    for folder in folders:
        folder.mkdir()
        layouts.peft(folder)
    paths = [folder / "adapter_model.safetensors" if form == "files" else folder for folder in folders]
    assert check(paths).compatible
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    (folders[1] / "adapter_config.json").write_text(json.dumps(config | {key: other}))
    with pytest.raises(IncompatibleError, match=rf"'{key}': setting: expected .* got .* in .*checkpoint-2(.|\n)*Merge"):
        average(paths, tmp_path / "out")


@pytest.mark.parametrize("config", ["", "[1]", "{", '{"r": NaN}'])
def test_a_configuration_that_cannot_be_read_is_no_obstacle(tmp_path: Path, config: str) -> None:
    layouts.peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(config)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.spec.settings) <= {"r"}
