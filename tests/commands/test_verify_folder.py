"""`verify` of output folders: what is missing, damaged or exchanged is found, and said by its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_avg
from ckpt_avg.errors import UsageError, VerificationError

LARGEST = 2000  # bytes in a shard
Damage = Callable[[Path, Path], str]  # changes a folder, may copy of another one; returns the file to be named


def state(seed: int) -> dict[str, torch.Tensor]:
    values = torch.Generator().manual_seed(seed)
    return {f"layer{n}.weight": torch.randn(9, 20, generator=values) for n in range(7)} | {"big": torch.ones(999)}


def run_of(folder: Path, seeds: range) -> Path:
    """A run of two transformers checkpoints."""
    for seed in seeds:
        checkpoint = folder / f"checkpoint-{10 * seed + 10}"
        checkpoint.mkdir(parents=True)
        save_file(state(seed), checkpoint / "model.safetensors", metadata={"format": "pt"})
        (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run", range(2))


@pytest.fixture
def release(tmp_path: Path, run: Path) -> Path:
    ckpt_avg.average(run, tmp_path / "release", max_shard_size=LARGEST)
    return tmp_path / "release"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same of another run: equal names, shapes and sizes."""
    ckpt_avg.average(run_of(tmp_path / "other_run", range(2, 4)), tmp_path / "other", max_shard_size=LARGEST)
    return tmp_path / "other"


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def test_shards_are_verified_with_their_sources(run: Path, release: Path) -> None:
    shards = shards_of(release)
    assert len(shards) == 5
    report = ckpt_avg.verify(release, sources=run)
    assert report.tensors == 8
    assert report.nbytes == sum(each.stat().st_size for each in shards)
    assert [path.name for path in report.checkpoints or ()] == ["checkpoint-10", "checkpoint-20"]
    assert sorted(report.files) == sorted(each.name for each in release.iterdir())
    assert ckpt_avg.verify(release / "model.safetensors.index.json").data_digest == report.data_digest


def test_shards_have_the_mean_that_one_file_has(tmp_path: Path, run: Path, release: Path) -> None:
    ckpt_avg.average(run, tmp_path / "one.safetensors")
    found = {name: tensor for each in shards_of(release) for name, tensor in load_file(each).items()}
    expected = load_file(tmp_path / "one.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def flipped(path: Path, place: int) -> Path:
    contents = bytearray(path.read_bytes())
    contents[place] ^= 4
    path.write_bytes(contents)
    return path


def damaged_data(release: Path, other: Path) -> str:
    return flipped(shards_of(release)[2], -7).name


def damaged_header(release: Path, other: Path) -> str:
    return flipped(shards_of(release)[1], 40).name


def damaged_side_file(release: Path, other: Path) -> str:
    return flipped(release / "config.json", 3).name


def missing_shard(release: Path, other: Path) -> str:
    shards_of(release)[3].unlink()
    return "model-00004-of-00005.safetensors"


def missing_index(release: Path, other: Path) -> str:
    (release / "model.safetensors.index.json").unlink()
    return "model.safetensors.index.json"


def missing_side_file(release: Path, other: Path) -> str:
    (release / "config.json").unlink()
    return "config.json"


def exchanged_shard(release: Path, other: Path) -> str:
    name = shards_of(release)[4].name
    shutil.copy(other / name, release / name)
    return name


def most_shards_exchanged(release: Path, other: Path) -> str:
    for each in shards_of(release)[1:]:
        shutil.copy(other / each.name, each)
    return "model-00005-of-00005.safetensors"  # the index says which are the others


def swapped_names(release: Path, other: Path) -> str:
    first, second = shards_of(release)[1:3]
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    return first.name


def index_of_another(release: Path, other: Path) -> str:
    shutil.copy(other / "model.safetensors.index.json", release)
    return "model.safetensors.index.json"


def wrong_place(release: Path, other: Path) -> str:
    index = json.loads((release / "model.safetensors.index.json").read_text())
    index["weight_map"]["big"] = "model-00002-of-00005.safetensors"
    (release / "model.safetensors.index.json").write_text(json.dumps(index))
    return "it says that 'big' is in 'model-00002-of-00005.safetensors'"


def wrong_size(release: Path, other: Path) -> str:
    path = release / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"total_size": 9036', '"total_size": 9037'))
    return path.name


def no_json(release: Path, other: Path) -> str:
    (release / "model.safetensors.index.json").write_text("[" * 100_000)
    return "model.safetensors.index.json"


DAMAGES: list[Damage] = [
    *(damaged_data, damaged_header, damaged_side_file, missing_shard, missing_index, missing_side_file),
    *(exchanged_shard, most_shards_exchanged, swapped_names, index_of_another, wrong_place, wrong_size, no_json),
]


@pytest.mark.guarantee("verify-damage")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_of_a_folder_is_found_and_named(release: Path, other: Path, damage: Damage) -> None:
    before = {each.name: each.read_bytes() for each in release.iterdir()}
    named = damage(release, other)
    assert {each.name: each.read_bytes() for each in release.iterdir()} != before
    with pytest.raises(VerificationError) as error:
        ckpt_avg.verify(release)
    assert named in str(error.value)


def test_shards_of_other_checkpoints_are_not_the_mean(tmp_path: Path, release: Path, other: Path) -> None:
    """If it failed, only the first shard would be compared."""
    run = tmp_path / "other_run"
    for name in ("checkpoint-30", "checkpoint-40"):
        (run / name).rename(run / f"checkpoint-{int(name[-2:]) - 20}")
    with pytest.raises(VerificationError, match="not the mean of these checkpoints: it differs"):
        ckpt_avg.verify(release, sources=run)


def test_an_edited_card_and_more_files_are_no_damage(release: Path, run: Path) -> None:
    (release / "README.md").write_text("mine")
    (release / ".gitattributes").write_text("mine")
    ckpt_avg.average(run, release / "a.safetensors")
    assert ckpt_avg.verify(release).unknown == (".gitattributes", "a.safetensors")


def test_a_file_in_place_of_the_weights_is_found(tmp_path: Path, run: Path) -> None:
    """If it failed, an average of other checkpoints could be put there."""
    ckpt_avg.average(run, f"{tmp_path}/release/")
    ckpt_avg.average(run, tmp_path / "release" / "model.safetensors", overwrite=True)
    with pytest.raises(UsageError, match=r"is not an output folder, .* verify .*model\.safetensors"):
        ckpt_avg.verify(tmp_path / "release")


def test_one_shard_is_verified_alone(release: Path, run: Path) -> None:
    shard = shards_of(release)[1]
    assert ckpt_avg.verify(shard).tensors < 8
    with pytest.raises(UsageError, match=r"is one of several shards\. .* name its folder"):
        ckpt_avg.verify(shard, sources=run)


def test_other_folders_are_told_where_the_output_is(tmp_path: Path, release: Path, run: Path) -> None:
    with pytest.raises(UsageError, match=r"contains an output\. Write ckpt-avg verify .*release"):
        ckpt_avg.verify(tmp_path)
    with pytest.raises(VerificationError, match="contains no weights that ckpt-avg wrote"):
        ckpt_avg.verify(run)


def test_a_copy_of_shards_keeps_what_they_record(tmp_path: Path, release: Path) -> None:
    """If it failed, a refresh of a sharded release would forget what it is the mean of."""
    ckpt_avg.average(release, tmp_path / "copy.safetensors")
    kept = ckpt_avg.verify(tmp_path / "copy.safetensors").metadata
    assert kept["ckpt_avg.method"] == "mean"
    assert "checkpoint-10" in kept["ckpt_avg.sources"]
    assert not [key for key in kept if "shard" in key or key == "ckpt_avg.files"]


def test_an_average_in_shards_is_no_checkpoint_of_a_run(run: Path) -> None:
    """If it failed, the next run would average the average, too."""
    ckpt_avg.average(run, run / "release", max_shard_size=LARGEST)
    found: Any = ckpt_avg.average(run, run / "again.safetensors", dry_run=True)
    assert [each.name for each in found.checkpoints] == ["checkpoint-10", "checkpoint-20"]
    assert ckpt_avg.inspect(run / "release").checkpoint.averaged


# -- several models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pipelines(tmp_path: Path) -> Path:
    """A run of pipelines of two models with equal names of tensors, as diffusers saves them."""
    run = tmp_path / "run"
    for step in (10, 20):
        for number, model in enumerate(("unet", "vae")):
            folder = run / f"checkpoint-{step}" / model
            folder.mkdir(parents=True)
            save_file(state(step + number), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text('{"_class_name": "Model"}')
        index = {"_class_name": "Pipeline", "unet": ["diffusers", "Model"], "vae": ["diffusers", "Model"]}
        (run / f"checkpoint-{step}" / "model_index.json").write_text(json.dumps(index))
    return run


@pytest.mark.parametrize("largest", [None, LARGEST])
def test_all_models_of_a_folder_are_verified(tmp_path: Path, pipelines: Path, largest: int | None) -> None:
    result = ckpt_avg.average(pipelines, f"{tmp_path}/release/", max_shard_size=largest)
    release = tmp_path / "release"
    report = ckpt_avg.verify(release, sources=pipelines)
    assert (report.tensors, report.data_digest) == (16, result.data_digest)
    assert [each.name for each in report.checkpoints or ()] == ["checkpoint-10", "checkpoint-20"]
    assert ckpt_avg.verify(release / "vae", sources=pipelines).tensors == 8
    file = sorted((release / "vae").glob("*.safetensors"))[-1]
    flipped(file, -5)
    for folder in (release, release / "vae"):
        with pytest.raises(VerificationError, match=str(file)):
            ckpt_avg.verify(folder)
    assert ckpt_avg.verify(release / "unet").tensors == 8


def test_exchanged_models_are_found(tmp_path: Path, pipelines: Path) -> None:
    """If it failed, only one model would be compared with its sources."""
    ckpt_avg.average(pipelines, f"{tmp_path}/release/")
    unet, vae = (tmp_path / "release" / name / "diffusion_pytorch_model.safetensors" for name in ("unet", "vae"))
    vae.write_bytes(unet.read_bytes())
    with pytest.raises(VerificationError, match=r"vae.* has the model 'unet', not 'vae'"):
        ckpt_avg.verify(tmp_path / "release")
    ckpt_avg.average(sorted(pipelines.glob("*/vae")), vae, overwrite=True)
    with pytest.raises(VerificationError, match=r"vae.* records other files"):
        ckpt_avg.verify(tmp_path / "release")


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_that_a_loader_might_take_instead_are_found(release: Path, name: str) -> None:
    """transformers prefers one file to shards: it would load other weights than those that were verified."""
    save_file(state(5), release / name)
    with pytest.raises(VerificationError, match=f"weights that were not written with it: '{name}'"):
        ckpt_avg.verify(release)
