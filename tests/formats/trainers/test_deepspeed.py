"""DeepSpeed: 16-bit weights of ZeRO stages 1 and 2 are read; what is cut across ranks is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import layouts
import pytest
from formats.reading import Command, assert_same, averaged, check_saved, listed, mean, names, refusal
from layouts import Saved

from ckpt_avg import open_checkpoint


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2(tmp_path: Path, in_process: Command, stage: int) -> None:
    """The 16-bit module is read, and a note says that float32 masters are elsewhere."""
    (tmp_path / "run").mkdir()
    run = layouts.deepspeed(tmp_path / "run", stage=stage)
    for saved in run.checkpoints:
        for path in (saved.path, saved.path / "mp_rank_00_model_states.pt"):
            check_saved(Saved(path, saved.raw, None, saved.state_key, saved.step), "DeepSpeed")
            with open_checkpoint(path) as checkpoint:
                assert any("float32" in note or "zero_to_fp32" in note for note in checkpoint.spec.notes)
    shown = listed(in_process, run.folder)
    assert names(shown["checkpoints"]) == ["global_step90", "global_step100"]
    assert [entry["step"] for entry in shown["checkpoints"]] == [90, 100]
    assert_same(averaged(in_process, run.folder), mean([each.raw for each in run.checkpoints]))


def test_stage_3_is_refused_with_the_command_that_converts_it(tmp_path: Path, in_process: Command) -> None:
    """Empty tensors, or one rank's part, taken as the weights."""
    place = layouts.deepspeed(tmp_path, stage=3).checkpoints[-1].path
    for path in (place, place / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        assert "zero_to_fp32" in refusal(path)
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "zero_to_fp32" in errors


def test_optimizer_states_are_no_checkpoint(tmp_path: Path) -> None:
    run = layouts.deepspeed(tmp_path)
    refusal(run.checkpoints[0].path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def test_several_model_parallel_ranks_are_refused(tmp_path: Path) -> None:
    """Half of each matrix would be mistaken for the whole."""
    place = layouts.deepspeed(tmp_path).checkpoints[0].path
    shutil.copyfile(place / "mp_rank_00_model_states.pt", place / "mp_rank_01_model_states.pt")
    assert "2 ranks" in refusal(place)


def test_layers_of_a_pipeline_are_refused(tmp_path: Path, in_process: Command) -> None:
    """GPT-NeoX: each layer has a file, and the module in the usual file is None."""
    folder = tmp_path / "global_step100"
    folder.mkdir()
    for layer in range(2):
        layouts.save(layouts.tokens(layer), folder / f"layer_{layer:02}-model_00-model_states.pt")
    layouts.save({"module": None, "ds_version": "0.9", "global_steps": 100}, folder / "mp_rank_00_model_states.pt")
    for path in (folder, *folder.iterdir()):
        assert "pipeline parallelism stores each layer in a file of its own" in refusal(path)
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "tools/ckpts/convert_neox_to_hf.py" in errors
