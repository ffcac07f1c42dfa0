"""`average` into shards: the weights, statistics and metrics of one file, whatever computes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import data, make, score, trained
from safetensors.torch import load_file, save_file
from system.faults.rank_runs import in_threads
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import ckpt_avg
from ckpt_avg import average

SIZES = ("1KB", "200KB")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for each in folder.glob("*.safetensors") for name, tensor in load_file(each).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run_of(folder: Path, states: list[dict[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    for step, state in enumerate(states):
        torch.save(state, folder / f"step_{step}.pt")
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Odd numbers of bytes, so that shards begin anywhere in the data section; large, small and empty tensors."""
    states = []
    for seed in range(3):
        values = torch.Generator().manual_seed(seed)
        state: dict[str, torch.Tensor] = {f"u{n}": torch.full((1001 + 2 * n,), n, dtype=torch.uint8) for n in range(4)}
        for n, size in enumerate((301, 3, 70_001, 0, 97, 40_003)):
            state[f"f{n}"] = torch.randn(size, generator=values)
            state[f"h{n}"] = torch.randn(size, generator=values).bfloat16()
            state[f"d{n}"] = torch.randn(size // 3, generator=values, dtype=torch.float64)
        states.append(state)
    return run_of(tmp_path / "run", states)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("largest", SIZES)
def test_shards_have_the_tensors_of_one_file(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, engine: str, largest: str
) -> None:
    """If it failed, bytes would go to the wrong shard, or the torch engine would not write at odd offsets."""
    monkeypatch.setenv("CKPT_AVG_ENGINE", engine)
    average(mixed, tmp_path / "one.safetensors", memory=1 << 20, threads=3)
    result = average(mixed, tmp_path / "shards", max_shard_size=largest, memory=1 << 20, threads=3)
    assert len([name for name in result.files if name.endswith(".safetensors")]) > 3
    assert equal(tensors_in(tmp_path / "shards"), load_file(tmp_path / "one.safetensors"))
    report = ckpt_avg.verify(tmp_path / "shards", sources=mixed)
    assert (report.data_digest, report.nbytes) == (result.data_digest, result.nbytes)


@pytest.mark.parametrize("largest", SIZES)
def test_any_number_of_ranks_gives_the_shards_of_one(tmp_path: Path, mixed: Path, largest: str) -> None:
    """If it failed, ranks would write to other shards, or to one page of a file."""
    options: dict[str, Any] = {"max_shard_size": largest}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    average(mixed, tmp_path / "a" / "release", **options)
    ends = in_threads(3, lambda ranks: average(mixed, tmp_path / "b" / "release", ranks=ranks, **options))
    assert not any(isinstance(end, BaseException) for end in ends), ends
    assert files_of(tmp_path / "a" / "release") == files_of(tmp_path / "b" / "release")
    assert [each.name for each in (tmp_path / "b").iterdir()] == ["release"]


def test_statistics_and_metrics_are_those_of_one_file(tmp_path: Path) -> None:
    """If it failed, a refresh would write over other bytes, or measure other weights."""
    run = run_of(tmp_path / "run", [trained(seed) for seed in range(3)])
    options: dict[str, Any] = {"model": make, "data": data, "evaluate": score, "device": "cpu"}
    one = average(run, tmp_path / "one.safetensors", **options)
    shards = average(run, tmp_path / "shards", max_shard_size=1000, **options)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 1  # these weights are small
    assert shards.evaluations == one.evaluations
    assert equal(tensors_in(tmp_path / "shards"), load_file(tmp_path / "one.safetensors"))


class Wide(nn.Module):
    """Large enough for shards, with BatchNorm and spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(6, 80))
        self.norm = nn.BatchNorm1d(80)
        self.last = nn.Linear(80, 7)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(inputs.flatten(1))))


def test_what_is_computed_after_the_mean_goes_to_its_shards(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [trained(seed, Wide) for seed in range(3)])

    def score(model: nn.Module) -> dict[str, float]:
        return {"loss": model(torch.cat(data(7))).double().square().sum().item()}

    options: dict[str, Any] = {"model": Wide, "data": data, "evaluate": score, "device": "cpu"}
    one = average(run, tmp_path / "one.safetensors", **options)
    shards = average(run, tmp_path / "shards", max_shard_size=1000, **options)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert (shards.statistics, shards.spectral_norms) == ("refreshed", one.spectral_norms)
    assert shards.evaluations == one.evaluations
    assert equal(tensors_in(tmp_path / "shards"), load_file(tmp_path / "one.safetensors"))
    report = ckpt_avg.verify(tmp_path / "shards", sources=run)
    assert {"norm.running_mean", "norm.running_var"} <= set(report.measured)
    assert report.spectral_norms == one.spectral_norms


def test_a_failed_gate_leaves_no_shard(tmp_path: Path, mixed: Path) -> None:
    run = run_of(tmp_path / "trained", [trained(seed, Wide) for seed in range(2)])
    options: dict[str, Any] = {"model": Wide, "bn": "keep", "evaluate": lambda model: {"loss": 1.0}, "device": "cpu"}
    with pytest.raises(ckpt_avg.RequirementError):
        average(run, tmp_path / "out" / "release", max_shard_size=1000, require="loss<0.5", **options)
    assert not (tmp_path / "out").exists()


def test_larger_tensors_are_told(tmp_path: Path, mixed: Path) -> None:
    result = average(mixed, tmp_path / "shards", max_shard_size="200KB", dry_run=True)
    (notice,) = [each for each in result.notices if "shard" in each]
    assert "'f2'" in notice
    assert not (tmp_path / "shards").exists()


class Tied(nn.Module):
    """A language model with tied weights, as transformers calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 5)
        self.lm_head = nn.Linear(5, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@pytest.mark.parametrize(
    "config",
    [
        '{"model_type": "gpt2"}',
        '{"model_type": "llama", "tie_word_embeddings": false}',
        '{"model_type": "llava", "text_config": {"tie_word_embeddings": false}}',
        '{"architecture": "resnet18"}',
        None,
    ],
)
def test_tied_weights_are_stored_once_only_for_transformers(tmp_path: Path, config: str | None) -> None:
    """If it failed, others could not load the folder, or the user's model would not get the average to measure."""
    for step in range(2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.manual_seed(step)
        torch.save(Tied().state_dict(), folder / "pytorch_model.bin")
        if config:
            (folder / "config.json").write_text(config)

    def score(model: nn.Module) -> dict[str, float]:
        return {"sum": model.lm_head.weight.double().sum().item()}

    result = average(
        tmp_path / "run", f"{tmp_path}/release/", model=Tied, evaluate=score, device="cpu", dtype="bfloat16"
    )
    found = tensors_in(tmp_path / "release")
    names = {"embed_tokens.weight"} if config and "gpt2" in config else {"embed_tokens.weight", "lm_head.weight"}
    assert found.keys() == names
    assert result.evaluations[-1].metrics["sum"] == found["embed_tokens.weight"].double().sum().item()
    assert ckpt_avg.verify(tmp_path / "release", sources=tmp_path / "run").tensors == len(names)
    assert len([each for each in result.notices if each.startswith("tied weights")]) == 1


def test_layers_that_share_weights_are_stored_under_each_name(tmp_path: Path) -> None:
    """If it failed, transformers would make random weights for the names that are left out."""
    layer = nn.Linear(3, 3)
    for step in range(2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        torch.save({**Tied().state_dict(), **nn.Sequential(layer, layer).state_dict()}, folder / "pytorch_model.bin")
        layer.weight.data += 1
    result = average(tmp_path / "run", f"{tmp_path}/release/")
    assert tensors_in(tmp_path / "release").keys() == {
        *("embed_tokens.weight", "0.weight", "1.weight", "0.bias", "1.bias")
    }
    assert len([each for each in result.notices if each.startswith("tied weights")]) == 2


def test_what_is_not_tied_in_the_sources_is_not_their_mean(tmp_path: Path) -> None:
    """If it failed, verify would not look at tensors that an output lacks."""
    for step in range(2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        torch.save(Tied().state_dict(), folder / "pytorch_model.bin")
    average(tmp_path / "run", f"{tmp_path}/release/")
    sources = sorted((tmp_path / "run").iterdir())
    before = ckpt_avg.open_checkpoint(sources[0])
    torch.save({name: tensor.clone() for name, tensor in Tied().state_dict().items()}, sources[0] / "pytorch_model.bin")
    with before, pytest.raises(ckpt_avg.VerificationError):
        ckpt_avg.verify(tmp_path / "release", sources=tmp_path / "run")


@pytest.mark.parametrize(("largest", "suffix"), [(None, ".fp16"), ("1KB", "")])
def test_all_models_of_a_folder_keep_their_variant_or_none_does(
    tmp_path: Path, largest: str | None, suffix: str
) -> None:
    """If it failed, diffusers would load the pipeline neither with the variant nor without it."""
    for step in (1, 2):
        for model, count in (("unet", 3), ("vae", 1)):
            folder = tmp_path / "run" / f"checkpoint-{step}" / model
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            tensors = {str(each): torch.full((300,), float(step)).half() for each in range(count)}
            save_file(tensors, folder / "diffusion_pytorch_model.fp16.safetensors")
    result = average(tmp_path / "run", f"{tmp_path}/release/", max_shard_size=largest)
    assert f"vae/diffusion_pytorch_model{suffix}.safetensors" in result.files
    assert any("unet" in name and suffix in name and name.endswith(".safetensors") for name in result.files)
    assert ("unet/diffusion_pytorch_model.safetensors.index.json" in result.files) is (largest is not None)
    assert ckpt_avg.verify(tmp_path / "release", sources=tmp_path / "run").tensors == 4
