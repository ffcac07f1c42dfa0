"""Folders of several models: which folders are such, and that they are one checkpoint with the tensors of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckpt_avg import average, check, compare, inspect, verify
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, UsageError
from ckpt_avg.formats.models import models_of

PARTS = ("unet", "vae", "tokenizer", "scheduler")
PIPELINE = {"_class_name": "Pipeline", **{name: ["library", "Class"] for name in PARTS}}
MODULES = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]


def model(path: Path, value: float, name: str = "diffusion_pytorch_model.safetensors") -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {"w": torch.full((3,), float(value)), "bn.bias": torch.full((2,), -float(value))}, path / name, {"format": "pt"}
    )
    (path / "config.json").write_text(json.dumps({"of": path.name}))


def pipeline(path: Path, step: int, *, marked: bool = True) -> Path:
    """Two networks, of which one is the same in all checkpoints, a tokenizer, a scheduler, and what is not its own."""
    model(path / "unet", step)
    model(path / "vae", 7)
    model(path / "unet_ema", 100)
    for folder, name in (("tokenizer", "vocab.json"), ("scheduler", "scheduler_config.json"), ("logs", "config.json")):
        (path / folder).mkdir()
        (path / folder / name).write_text("{}")
    if marked:
        (path / "model_index.json").write_text(json.dumps(PIPELINE))
    torch.save({}, path / "optimizer.bin")
    return path


def sentence(path: Path, step: int) -> Path:
    """A transformer in the folder itself, a pooling without weights, a dense layer."""
    model(path, step, "model.safetensors")
    model(path / "2_Dense", 10 * step, "model.safetensors")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "modules.json").write_text(json.dumps(MODULES))
    return path


@pytest.mark.parametrize("marked", [True, False])
def test_each_model_of_a_pipeline_is_averaged_and_the_folder_rebuilt(tmp_path: Path, marked: bool) -> None:
    paths = [pipeline(tmp_path / f"checkpoint-{step}", step, marked=marked) for step in (1, 3)]
    result = average(tmp_path, f"{tmp_path}/out/release/", sha256=True)
    index = ["model_index.json"] if marked else []
    stem = "diffusion_pytorch_model"
    assert result.files == (
        f"unet/{stem}.safetensors", f"vae/{stem}.safetensors", "README.md", "SHA256SUMS", *index,
        "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json", "vae/config.json",
    )  # fmt: skip
    unet = load_file(result.output / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(unet["w"], torch.full((3,), 2.0))
    same = result.output / "vae" / "diffusion_pytorch_model.safetensors"
    assert torch.equal(load_file(same)["w"], torch.full((3,), 7.0))
    assert (result.tensors, len(result.checkpoints)) == (4, 2)
    with safe_open(str(same), framework="pt") as file:
        recorded = file.metadata()
    assert recorded["ckpt_avg.model"] == "vae"
    source = json.loads(recorded["ckpt_avg.sources"])[0]
    assert source["name"] == "checkpoint-1"
    assert source["bytes"] == (paths[0] / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert json.loads(recorded["ckpt_avg.files"]).keys() == set(result.files)
    assert verify(result.output, sources=tmp_path).data_digest == result.data_digest
    assert set(verify(result.output, sources=paths).checkpoints) == set(paths)


def test_a_sentence_transformer_has_a_model_in_the_folder_itself(tmp_path: Path) -> None:
    for step in (1, 3):
        sentence(tmp_path / f"checkpoint-{step}", step)
    result = average(tmp_path, f"{tmp_path}/release/")
    assert set(result.files) == {
        "model.safetensors", "2_Dense/model.safetensors", "README.md", "config.json", "modules.json",
        "1_Pooling/config.json", "2_Dense/config.json",
    }  # fmt: skip
    assert torch.equal(load_file(result.output / "model.safetensors")["w"], torch.full((3,), 2.0))
    assert torch.equal(load_file(result.output / "2_Dense" / "model.safetensors")["w"], torch.full((3,), 20.0))
    plain = average(tmp_path, tmp_path / "plain.safetensors")  # as ever: the transformer alone, with a notice
    assert any("2_Dense" in each for each in plain.notices)


def test_dtypes_and_names_are_those_of_each_model(tmp_path: Path) -> None:
    for step in (1, 3):
        path = tmp_path / f"checkpoint-{step}"
        model(path / "unet", step, "diffusion_pytorch_model.safetensors")
        model(path / "text_encoder", step, "pytorch_model.safetensors")
        (path / "text_encoder" / "config.json").write_text('{"dtype": "float32"}')
        (path / "model_index.json").write_text("{}")
    result = average(tmp_path, f"{tmp_path}/release/", dtype="float16")
    assert result.files[:2] == ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    assert json.loads((result.output / "text_encoder" / "config.json").read_text()) == {"dtype": "float16"}
    assert "text_encoder/config.json: names float16" in str(result.notices)


def test_a_pipeline_needs_no_step_in_its_name(tmp_path: Path) -> None:
    paths = [pipeline(tmp_path / name, value) for name, value in (("base", 1), ("tuned", 3))]
    result = average(paths, f"{tmp_path}/release/")
    assert torch.equal(load_file(result.output / result.files[0])["w"], torch.full((3,), 2.0))


def test_the_final_pipeline_next_to_the_checkpoints_is_not_one_of_them(tmp_path: Path) -> None:
    """As diffusers' training scripts leave it in the run folder itself."""
    pipeline(tmp_path, 100)
    for step in (1, 3):
        pipeline(tmp_path / f"checkpoint-{step}", step)
    result = average(tmp_path, f"{tmp_path}/out/release/")
    assert [path.name for path in result.checkpoints] == ["checkpoint-1", "checkpoint-3"]


def test_a_file_as_output_is_an_error_that_names_the_models_and_what_to_write(tmp_path: Path) -> None:
    for step in (1, 3):
        pipeline(tmp_path / f"checkpoint-{step}", step)
    with pytest.raises(CheckpointFormatError) as error:
        average(tmp_path, tmp_path / "out.safetensors")
    assert str(error.value) == (
        f"{tmp_path}/checkpoint-1: the folder has several models: 'unet', 'vae'. `average` takes all of them with -o "
        f"FOLDER/. Or name one of each checkpoint: {tmp_path}/checkpoint-*/unet"
    )
    one = average(sorted(tmp_path.glob("checkpoint-*/unet")), tmp_path / "out.safetensors")
    assert torch.equal(load_file(one.output)["w"], torch.full((3,), 2.0))


@pytest.mark.parametrize("option", ["model", "data"])
def test_user_code_is_for_one_model(tmp_path: Path, option: str) -> None:
    for step in (1, 3):
        pipeline(tmp_path / f"checkpoint-{step}", step)
    given: dict[str, Any] = {option: lambda: torch.nn.Linear(1, 1)}
    with pytest.raises(
        UsageError, match=rf"--{option}: is for one model, and the checkpoints have several: 'unet', 'vae'"
    ):
        average(tmp_path, f"{tmp_path}/release/", **given)


def test_checkpoints_with_other_models_do_not_fit_together(tmp_path: Path) -> None:
    for step in (1, 3):
        path = pipeline(tmp_path / f"checkpoint-{step}", step)
    model(path / "controlnet", 1)
    with pytest.raises(IncompatibleError, match=r"controlnet\.w"):
        average(tmp_path, f"{tmp_path}/release/")


def test_an_equal_model_does_not_make_checkpoints_copies(tmp_path: Path) -> None:
    """Checkpoints are copies if all models are equal; one frozen model says nothing."""
    for step in (1, 3):
        pipeline(tmp_path / f"checkpoint-{step}", step)
    pipeline(tmp_path / "checkpoint-4", 3)
    result = average(tmp_path, f"{tmp_path}/out/release/")
    assert len(result.checkpoints) == 2
    assert check(tmp_path).compatible
    assert len(compare(tmp_path).checkpoints) == 2
    assert {each.spec.path.name for each in inspect(tmp_path).listed} >= {"checkpoint-1", "checkpoint-3"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors"], []),
        (["unet/model.safetensors"], []),
        (["unet/model.safetensors", "vae/model.safetensors"], ["unet", "vae"]),
        (["model_index.json", "unet/model.safetensors"], ["unet"]),
        (["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors"], ["unet"]),
        (["model.safetensors", "other/model.safetensors"], []),
        (["model.safetensors", "other/model.safetensors", "other/config.json"], ["", "other"]),
        (["adapter_model.safetensors", "two/adapter_model.safetensors", "two/adapter_config.json"], ["", "two"]),
        (["modules.json", "0_A/model.safetensors", "2_Dense/model.safetensors"], ["0_A", "2_Dense"]),
        (["modules.json", "model.safetensors", "1_Pooling/config.json"], [""]),
        (["unet/model.safetensors", "unet_ema/model.safetensors"], []),
        (["model_index.json", "unet/model.safetensors", "checkpoint-5/model.safetensors"], ["unet"]),
        (["model_index.json", "unet/model.safetensors", ".hidden/model.safetensors"], ["unet"]),
        (["model_index.json", "unet/model.safetensors", "optimizer/model.safetensors"], ["unet"]),
        (["net_g.pt", "net_d.pt"], []),
    ],
)  # fmt: skip
def test_which_folders_have_several_models(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    folder = tmp_path / "step-9"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        elif name.endswith(".pt"):
            torch.save({"w": torch.ones(2)}, folder / name)
        else:
            save_file({"w": torch.ones(2)}, folder / name)
    assert list(models_of(folder)) == expected


def test_an_output_next_to_the_folder_of_the_checkpoints_is_skipped(tmp_path: Path) -> None:
    """The same command can be given again: what it wrote is no checkpoint, unless it is named."""
    for step in (1, 3):
        model(tmp_path / "checkpoints" / f"checkpoint-{step}", step, "model.safetensors")
    for overwrite in (False, True):
        result = average(tmp_path, f"{tmp_path}/release/", overwrite=overwrite)
        assert len(result.checkpoints) == 2
    assert [each.path.name for each in result.skipped] == ["release"]
    assert len(average(tmp_path / "release", tmp_path / "copy.safetensors").checkpoints) == 1


def test_a_run_of_folders_is_not_dropped_for_another_model(tmp_path: Path) -> None:
    """A model that is not ours next to the folder of the checkpoints: which is meant is for the user to say."""
    for step in (1, 3):
        model(tmp_path / "checkpoints" / f"checkpoint-{step}", step, "model.safetensors")
    model(tmp_path / "other", 5, "model.safetensors")
    with pytest.raises(IncompatibleError, match="2 folders with checkpoints: 'checkpoints', 'other'"):
        average(tmp_path, tmp_path / "out.safetensors")
