"""Every checkpoint that a real library left opens with its weights, its names and what was recorded of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formats.reading import assert_same, read
from system.trainers.runs import RUNS, Run

from ckpt_avg import CheckpointFormatError, open_checkpoint

pytestmark = pytest.mark.trainers
WITH_EMA = ("lightning_average", "timm", "timm_top", "mmengine_average")


def every_run(test: Any) -> Any:
    return pytest.mark.parametrize("run", RUNS, indirect=True)(test)


@every_run
def test_the_weights_are_those_that_the_library_saved(run: Run) -> None:
    """Bit for bit, under the names of the model without wrappers, and nothing else."""
    for saved in run.checkpoints:
        assert_same(read(saved.path), saved.truth)


@pytest.mark.parametrize("run", WITH_EMA, indirect=True)
def test_ema_takes_the_average_that_the_library_keeps(run: Run) -> None:
    """Two libraries save it where others save the raw weights."""
    for saved in run.checkpoints:
        assert_same(read(saved.path, ema=True), saved.ema)
        with open_checkpoint(saved.path, ema=True) as checkpoint:
            assert checkpoint.spec.averaged
        with open_checkpoint(saved.path) as checkpoint:
            assert any("--ema" in note for note in checkpoint.spec.notes)


@pytest.mark.parametrize(
    "run", [name for name in RUNS if name not in WITH_EMA and "averaged" not in name], indirect=True
)
def test_ema_is_refused_where_there_is_none(run: Run) -> None:
    """Raw weights passed off as an average would go unnoticed."""
    with pytest.raises(CheckpointFormatError, match="--ema"):
        open_checkpoint(run.checkpoints[0].path, ema=True).close()


@every_run
def test_what_the_library_recorded_is_known(run: Run) -> None:
    """A wrong step puts checkpoints in the wrong order; many carry the metrics of the best one, too."""
    for saved in run.checkpoints:
        with open_checkpoint(saved.path) as checkpoint:
            spec, record = checkpoint.spec, checkpoint.spec.record
        facts = saved.facts
        assert bool(spec.averaged) == facts.get("averaged", False)
        assert spec.kind == facts.get("kind", spec.kind)
        assert record.step == facts.get("step", record.step)
        assert record.epoch == facts.get("epoch", record.epoch)
        assert facts.get("metrics", {}).items() <= record.metrics.items()
        validated = facts.get("validated", {})
        assert all(record.metrics[name] == value for name, value in validated.items() if name in record.metrics)


@pytest.mark.parametrize("run", [name for name in RUNS if name.startswith("torch_")], indirect=True)
def test_a_scalar_among_the_weights_is_no_metric(run: Run) -> None:
    """Such as the temperature of this model, or CLIP's ``logit_scale``."""
    for saved in run.checkpoints:
        with open_checkpoint(saved.path) as checkpoint:
            assert dict(checkpoint.spec.record.metrics) == saved.facts.get("metrics", {})


@every_run
def test_inspect_tells_the_same(run: Run, in_process: Callable[..., tuple[int, str, str]]) -> None:
    """Of a checkpoint and of the run folder."""
    last = run.checkpoints[-1]
    code, out, err = in_process("inspect", last.path, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert {tensor["name"] for tensor in shown["tensors"]} == set(last.truth)
    assert shown["kind"] == last.facts.get("kind", shown["kind"])
    code, out, err = in_process("inspect", run.folder, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert [entry["path"] for entry in shown["checkpoints"]] == [str(saved.path) for saved in run.checkpoints]
    assert shown["unreadable"] == {}
    assert in_process("inspect", last.path)[0] == 0
    assert in_process("inspect", run.folder)[0] == 0


@pytest.mark.parametrize(
    ("run", "prefix"),
    [
        (f"torch_{form}_{name}", prefix)
        for form in ("zip", "stream")
        for name, prefix in (
            ("bare", ""),
            ("compiled", "_orig_mod."),
            ("parallel", "module."),
            ("compiled_parallel", "module._orig_mod."),
            ("averaged", "module."),
        )
    ],
    indirect=["run"],
)
def test_what_was_stripped_from_the_names_is_told(run: Run, prefix: str) -> None:
    with open_checkpoint(run.checkpoints[0].path) as checkpoint:
        assert checkpoint.spec.prefix == prefix
        assert checkpoint.spec.format == ("torch zip" if "zip" in run.name else "torch stream")


@pytest.mark.parametrize(
    "run", ["bert_sharded", "dcp_safetensors_index", "dcp_safetensors_consolidated"], indirect=True
)
def test_the_index_of_shards_opens_like_its_folder(run: Run) -> None:
    """Scripts name either."""
    for saved in run.checkpoints:
        (index,) = saved.path.glob("*.index.json")
        assert_same(read(index), saved.truth)


@pytest.mark.parametrize("run", ["accelerate_fsdp"], indirect=True)
def test_the_folder_of_shards_opens_like_the_checkpoint_around_it(run: Run) -> None:
    for saved in run.checkpoints:
        assert_same(read(saved.path / "pytorch_model_fsdp_0"), saved.truth)


@pytest.mark.parametrize("run", ["accelerate_two"], indirect=True)
def test_a_second_model_beside_the_first_is_not_passed_over_in_silence(run: Run) -> None:
    with open_checkpoint(run.checkpoints[0].path) as checkpoint:
        assert any("model_1.safetensors" in note for note in checkpoint.spec.notes)


@pytest.mark.parametrize("run", ["gpt2_tied"], indirect=True)
def test_a_tied_weight_has_the_one_name_that_transformers_writes(run: Run) -> None:
    """It is restored by tying when the model is loaded."""
    with open_checkpoint(run.checkpoints[0].path) as checkpoint:
        assert "transformer.wte.weight" in checkpoint.spec.tensors
        assert "lm_head.weight" not in checkpoint.spec.tensors


@pytest.mark.parametrize("run", ["bert_sharded", "dcp_fsdp", "dcp_safetensors_two"], indirect=True)
def test_one_file_of_several_is_not_taken_for_the_whole(run: Run) -> None:
    """A shard alone lacks tensors, or rows of them."""
    for path in run.checkpoints[0].path.iterdir():
        if path.suffix in (".safetensors", ".distcp"):
            try:
                with open_checkpoint(path) as checkpoint:
                    assert any("shard" in note for note in checkpoint.spec.notes)
            except CheckpointFormatError as error:
                assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize("run", ["accelerate_fsdp"], indirect=True)
def test_the_part_of_one_rank_is_not_taken_for_the_whole(
    run: Run, tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    """Accelerate can let each rank save its rows; only the same ranks can load them."""
    folder = run.out / "refused"
    parts = sorted((folder / "checkpoint_0").iterdir())
    assert [path.name for path in parts] == ["pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_0_rank1.bin"]
    for path in (*parts, folder / "checkpoint_0"):
        with pytest.raises(CheckpointFormatError, match=re.escape(str(path))):
            open_checkpoint(path).close()
    for source in (folder, folder / "checkpoint_0"):
        code, _, err = in_process("average", source, "-o", tmp_path / "mean.safetensors", "--bn", "keep")
        assert code in (3, 4), err
        assert not (tmp_path / "mean.safetensors").exists()
