"""Where running statistics come from: when they are recomputed, when they are kept, and which notices the user gets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batchnorm.small_runs import Small, batches, metadata, raw, refuse, save, trained
from safetensors.torch import load_file
from torch import Tensor, nn

from ckpt_avg import UsageError, average


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save(trained(Small), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "missing", "given"),
    [
        ({}, "--model MODULE:FACTORY and --data MODULE:FACTORY", None),
        ({"bn": "refresh"}, "--model MODULE:FACTORY and --data MODULE:FACTORY", None),
        ({"model": Small}, "Add --data MODULE:FACTORY,", "--model"),
        ({"data": batches}, "Add --model MODULE:FACTORY,", "--data"),
    ],
    ids=["nothing", "only asked for", "only a model", "only data"],
)
def test_without_model_and_data_it_says_what_to_add(
    small: Path, options: dict[str, Any], missing: str, given: str | None
) -> None:
    message = refuse(UsageError, small, **options)
    assert "running statistics of 2 BatchNorm layers ('first', 'second')" in message
    assert missing in message
    assert "--bn keep" in message
    assert given is None or given not in message


def test_bn_keep_needs_no_model_and_says_what_it_did(small: Path, tmp_path: Path) -> None:
    result = average([small], tmp_path / "swa.safetensors", bn="keep")
    assert result.statistics == "mean"
    assert result.batch_norm is None
    (notice,) = result.notices
    assert "running statistics of 2 BatchNorm layers are the mean of the checkpoints'" in notice
    assert "Add --model and --data" in notice


def test_bn_keep_wins_over_a_model(small: Path, tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError

    result = average([small], tmp_path / "swa.safetensors", bn="keep", model=never, data=never)
    assert result.statistics == "mean"


@pytest.mark.guarantee("no-batchnorm")
@pytest.mark.parametrize("options", [{"model": nn.Linear, "data": batches}, {"bn": "refresh"}])
def test_without_batch_norm_a_refresh_is_a_notice(tmp_path: Path, options: dict[str, Any]) -> None:
    run = save(trained(lambda: nn.Linear(4, 2)), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", **options)
    assert result.statistics == "none"
    assert result.written
    assert result.notices == ("the checkpoints contain no BatchNorm statistics, so there is nothing to refresh",)
    assert "ckpt_avg.batch_norm" not in metadata(tmp_path / "swa.safetensors")


def freeze(states: list[dict[str, Tensor]], layer: str) -> list[dict[str, Tensor]]:
    statistics = {f"{layer}.running_mean", f"{layer}.running_var"}
    return [
        {name: states[0][name] if name in statistics else value for name, value in state.items()} for state in states
    ]


@pytest.mark.guarantee("frozen-layers")
def test_frozen_layers_keep_their_bytes_and_are_named(tmp_path: Path) -> None:
    states = freeze(trained(Small), "first")
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Small, data=batches, device="cpu")
    tensors = load_file(tmp_path / "swa.safetensors")

    assert result.batch_norm is not None
    assert result.batch_norm.frozen == ("first",)
    assert list(result.batch_norm.statistics) == ["second"]
    assert any("1 frozen BatchNorm layer kept" in notice and "'first'" in notice for notice in result.notices)
    for kind in ("running_mean", "running_var"):
        assert raw(tensors[f"first.{kind}"]) == raw(states[0][f"first.{kind}"])

    # The second layer sees the first as it will be in use: normalised by the frozen statistics.
    model = Small()
    model.load_state_dict(tensors)
    model.eval()
    with torch.no_grad():
        samples = model.outer(model.first(model.inner(torch.cat(batches()))).relu()).double()
    torch.testing.assert_close(tensors["second.running_mean"].double(), samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors["second.running_var"].double(), samples.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.guarantee("frozen-layers")
def test_layers_without_running_statistics_are_named(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = Small()
        model.first = nn.BatchNorm1d(6, track_running_stats=False)
        return model

    run = save(trained(make), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=make, data=batches)
    assert result.batch_norm is not None
    assert list(result.batch_norm.statistics) == ["second"]
    assert result.notices == ("layers without running statistics (track_running_stats=False), not measured: 'first'",)


def test_where_all_layers_are_frozen_no_data_is_needed(tmp_path: Path) -> None:
    states = freeze(freeze(trained(Small), "first"), "second")
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors")
    tensors = load_file(tmp_path / "swa.safetensors")
    assert result.statistics == "frozen"
    assert any("2 frozen BatchNorm layers" in notice for notice in result.notices)
    assert json.loads(metadata(tmp_path / "swa.safetensors")["ckpt_avg.batch_norm"]) == {"statistics": "frozen"}
    for layer, kind in itertools.product(("first", "second"), ("running_mean", "running_var")):
        assert raw(tensors[f"{layer}.{kind}"]) == raw(states[0][f"{layer}.{kind}"])


def test_a_layer_is_not_frozen_when_one_of_its_statistics_moves(tmp_path: Path) -> None:
    states = freeze(trained(Small), "first")
    states[2]["first.running_var"] = states[2]["first.running_var"] * 2
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Small, data=batches)
    assert result.batch_norm is not None
    assert sorted(result.batch_norm.statistics) == ["first", "second"]


def test_one_checkpoint_alone_is_refreshed(tmp_path: Path) -> None:
    """That its statistics equal themselves does not make them frozen."""
    run = save(trained(Small, count=1), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Small, data=batches)
    assert result.statistics == "refreshed"


def tracked_instance_norm(channels: int) -> nn.Module:
    class Unfolded(nn.InstanceNorm1d):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(torch.stack([values, -values + 1], dim=2)).mean(2)

    return Unfolded(channels, affine=True, track_running_stats=True)


def test_tracked_statistics_of_instance_norm_are_averaged_and_named(tmp_path: Path) -> None:
    """InstanceNorm is no BatchNorm: its statistics in train mode would be those of single samples."""

    class Mixed(Small):
        def __init__(self) -> None:
            super().__init__()
            self.second = tracked_instance_norm(3)

    states = trained(Mixed)
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Mixed, data=batches)
    tensors = load_file(tmp_path / "swa.safetensors")
    assert result.batch_norm is not None
    assert list(result.batch_norm.statistics) == ["first"]
    assert any("'second'" in notice and "the mean of the checkpoints'" in notice for notice in result.notices)
    for kind in ("running_mean", "running_var"):
        exact = torch.stack([state[f"second.{kind}"].double() for state in states]).sum(0) / 3
        assert torch.equal(tensors[f"second.{kind}"], exact.float())
    assert tensors["second.num_batches_tracked"].item() == states[-1]["second.num_batches_tracked"].item()


def test_instance_norm_alone_gives_a_notice_and_the_mean(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Small(tracked_instance_norm)

    run = save(trained(make), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=make, data=batches)
    assert result.statistics == "mean"
    assert result.batch_norm is None
    assert any(
        "no BatchNorm layers of the model" in notice and "'first', 'second'" in notice for notice in result.notices
    )
