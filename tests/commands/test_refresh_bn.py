"""`refresh_weights` and ``ckpt-avg refresh-bn``: new statistics, and everything else as it was, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from commands.user_modules import NET, App, InProcess, names, objects, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckpt_avg import (
    AverageResult,
    UsageError,
    average,
    inspect,
    refresh_batch_norm,
    refresh_weights,
)
from ckpt_avg.cli.average_text import refreshed_text

MODULE = f"""{NET}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)
        self.register_buffer("steps", torch.tensor(17))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scale", torch.tensor(-0.0))

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x))))

def make():
    return Net()

def falls(model, calls=[]):
    calls.append(1)
    return {{"m": 1.0 / len(calls)}}
"""
OBJECTS = objects(MODULE)
make, data, score = OBJECTS["make"], OBJECTS["data"], OBJECTS["score"]

STATISTICS = {
    f"{layer}.{buffer}"
    for layer in ("body.1", "norm")
    for buffer in ("running_mean", "running_var", "num_batches_tracked")
}


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as reader:
        return dict(reader.metadata() or {})


def by_hand(weights: dict[str, Tensor], batches: Any = None, **options: Any) -> dict[str, Tensor]:
    """The oracle: these weights in a live model, refreshed there."""
    model = make()
    model.load_state_dict(weights)
    refresh_batch_norm(model, data() if batches is None else batches, **options)
    return dict(model.state_dict())


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return trained(0, make)


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "weights.safetensors"
    save_file(weights, path, metadata={"format": "pt", "author": "me", "note": 'ünï\n"quoted"'})
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "refreshed.safetensors"


def refresh(source: Path, out: Path, **options: Any) -> AverageResult:
    return refresh_weights(source, out, **{"model": make, "data": data, "device": "cpu", **options})


def assert_refreshed(out: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = load_file(out)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        was = expected[name] if name in STATISTICS else weights[name]
        assert (tensor.dtype, tensor.shape, raw(tensor)) == (was.dtype, was.shape, raw(was)), name
    assert any(raw(found[name]) != raw(weights[name]) for name in STATISTICS)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_statistics_are_new_and_everything_else_is_bit_equal(
    source: Path, weights: dict[str, Tensor], out: Path
) -> None:
    """Integers, bools, empty tensors and -0.0 included; the statistics are those of a live model's refresh."""
    result = refresh(source, out)
    assert_refreshed(out, weights, by_hand(weights))
    assert result.statistics == "refreshed"
    assert result.batch_norm is not None
    assert (result.batch_norm.batches, result.batch_norm.samples) == (3, 15)
    # One checkpoint says nothing of whether its statistics ever change: no layer counts as frozen.
    assert (set(result.batch_norm.statistics), result.batch_norm.frozen) == ({"body.1", "norm"}, ())


@pytest.mark.parametrize(
    "options", [{"bn_batches": 2}, {"bn_estimator": "batch-mean"}, {"amp": "bfloat16"}], ids=lambda o: next(iter(o))
)
def test_options_of_the_refresh(source: Path, weights: dict[str, Tensor], out: Path, options: dict[str, Any]) -> None:
    refresh(source, out, **options)
    live = {{"bn_batches": "max_batches", "bn_estimator": "estimator", "amp": "amp"}[k]: v for k, v in options.items()}
    assert_refreshed(out, weights, by_hand(weights, **live))
    assert metadata(out)["ckpt_avg.batch_norm"]


def test_forward_batch(source: Path, weights: dict[str, Tensor], out: Path) -> None:
    deep = [{"deep": batch} for batch in data()]
    refresh(source, out, data=deep, forward_batch=lambda model, batch: model(batch["deep"]))
    assert_refreshed(out, weights, by_hand(weights))


def test_refreshing_twice_changes_nothing(source: Path, out: Path, tmp_path: Path) -> None:
    """The statistics depend on weights and data alone, and the metadata says the same."""
    refresh(source, out)
    refresh(out, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


def test_what_a_torch_file_stores_next_to_the_weights_is_no_metadata(
    tmp_path: Path, weights: dict[str, Tensor], out: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3, "lr": 0.1}, path)
    refresh(path, out)
    assert_refreshed(out, weights, by_hand(weights))
    assert not {"epoch", "lr"} & metadata(out).keys()


def test_state_key_prefix_and_ema(tmp_path: Path, weights: dict[str, Tensor], out: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": {f"net.{name}": tensor for name, tensor in weights.items()}, "b": trained(1, make)}, path)
    refresh(path, out, state_key="a", strip_prefix="net.")
    assert_refreshed(out, weights, by_hand(weights))
    torch.save({"state_dict": trained(1, make), "state_dict_ema": weights}, path)
    refresh(path, out, ema=True, overwrite=True)
    assert_refreshed(out, weights, by_hand(weights))


def test_a_run_folder_with_one_checkpoint(source: Path, weights: dict[str, Tensor], out: Path) -> None:
    refresh(source.parent, out)
    assert_refreshed(out, weights, by_hand(weights))


def test_another_dtype(source: Path, out: Path, weights: dict[str, Tensor]) -> None:
    """``--dtype`` converts the weights; the statistics are those of the converted ones."""
    refresh(source, out, dtype="bfloat16")
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights.items()}
    expected = by_hand({name: t.float() if t.is_floating_point() else t for name, t in narrow.items()})
    assert_refreshed(out, narrow, {name: t.to(narrow[name].dtype) for name, t in expected.items()})


def test_a_model_without_batch_norm_says_that_nothing_was_refreshed(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(2, 6), "bias": torch.ones(2)}, path)
    result = refresh(path, out, model=lambda: nn.Linear(6, 2))
    assert (result.batch_norm, result.statistics) == (None, "none")
    assert not refreshed_text(result).startswith("refreshed")
    assert [text for text in result.notices if "nothing to refresh" in text]
    assert {name: raw(tensor) for name, tensor in load_file(out).items()} == {
        name: raw(tensor) for name, tensor in load_file(path).items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def test_metadata_of_the_source_is_kept(source: Path, out: Path) -> None:
    refresh(source, out)
    before, after = metadata(source), metadata(out)
    assert {key: after[key] for key in before} == before
    about = json.loads(after["ckpt_avg.batch_norm"])
    assert (about["statistics"], about["samples"], about["estimator"]) == ("refreshed", 15, "pooled")


def test_what_an_average_says_of_itself_is_kept(tmp_path: Path, out: Path) -> None:
    """Of which checkpoints, and by which method: it stays an average. What it said of BatchNorm is no longer true."""
    paths = [tmp_path / f"step_{number}.pt" for number in range(3)]
    for number, path in enumerate(paths):
        torch.save(trained(number, make), path)
    kept = tmp_path / "kept.safetensors"
    average(paths, kept, bn="keep", dtype="float64", device="cpu")
    refresh(kept, out)
    before, after = metadata(kept), metadata(out)
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {
        "ckpt_avg.batch_norm",
        "ckpt_avg.data_digest",
        "ckpt_avg.header_digest",
    }
    assert [each["name"] for each in json.loads(after["ckpt_avg.sources"])] == ["step_0.pt", "step_1.pt", "step_2.pt"]
    assert (after["ckpt_avg.method"], after["ckpt_avg.dtype"]) == ("mean", "float64")
    assert json.loads(after["ckpt_avg.batch_norm"])["statistics"] == "refreshed"
    found = inspect(out).checkpoint
    assert found is not None
    assert found.averaged


def test_is_the_average_that_average_itself_would_have_refreshed(tmp_path: Path, out: Path) -> None:
    """First averaged and then refreshed, or both at once: the same bytes."""
    paths = [tmp_path / f"step_{number}.pt" for number in range(3)]
    for number, path in enumerate(paths):
        torch.save(trained(number, make), path)
    average(paths, tmp_path / "kept.safetensors", bn="keep", device="cpu")
    average(paths, tmp_path / "both.safetensors", model=make, data=data, device="cpu")
    refresh(tmp_path / "kept.safetensors", out)
    assert out.read_bytes() == (tmp_path / "both.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_several_checkpoints(tmp_path: Path, out: Path, in_process: InProcess) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(2):
        torch.save(trained(number, make), folder / f"step_{number}.pt")
    with pytest.raises(UsageError) as caught:
        refresh(folder, out)
    assert str(caught.value) == (
        f"{folder}: contains 2 checkpoints. Name one, for example {folder / 'step_1.pt'}, or use ckpt-avg average."
    )
    code, _, stderr = in_process("refresh-bn", folder, "-o", out, "--model", "missing:a", "--data", "missing:b")
    assert (code, stderr) == (2, f"Error: {caught.value}\n"), "sources come before the user's code"
    assert names(out.parent) == []


@pytest.mark.parametrize("named", ["file", "folder"])
def test_an_average_is_not_replaced_by_its_own_refresh(source: Path, tmp_path: Path, named: str) -> None:
    """Although --overwrite may replace an average that was made here: the output is read from it."""
    average([source], tmp_path / "copy.safetensors", device="cpu")
    (tmp_path / "copy.safetensors").rename(source)
    before = source.read_bytes()
    with pytest.raises(UsageError, match="one of the checkpoints"):
        refresh(source if named == "file" else source.parent, source, overwrite=True)
    assert source.read_bytes() == before


def test_one_pass_over_a_generator_is_enough(source: Path, out: Path, weights: dict[str, Tensor]) -> None:
    refresh(source, out, data=(batch for batch in data()))
    assert_refreshed(out, weights, by_hand(weights))


# ---------------------------------------------------------------------------------------------------------------------
# Measured before and after


def test_measured_before_and_after(source: Path, out: Path) -> None:
    result = refresh(source, out, evaluate=score)
    expected = []
    for path in (source, out):
        model = make()
        model.load_state_dict(load_file(path))
        with torch.no_grad():
            expected.append(score(model.eval()))
    assert [(each.name, each.metrics) for each in result.evaluations] == [
        ("weights.safetensors", expected[0]),
        ("these weights, statistics refreshed", expected[1]),
    ]
    assert expected[0] != expected[1]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return App(tmp_path, MODULE)


def test_the_command(app: App, source: Path, out: Path, weights: dict[str, Tensor], in_process: InProcess) -> None:
    code, stdout, stderr = in_process("refresh-bn", source, "-o", out, *app.options())
    assert code == 0, stderr
    assert_refreshed(out, weights, by_hand(weights))
    size = out.stat().st_size / 1024
    assert stdout.splitlines() == [
        "refreshed weights.safetensors",
        "BatchNorm statistics of 2 layers recomputed over 15 samples in 3 batches",
        f"wrote {out} ({size:.1f} KiB)",
    ]
    assert "copied" not in stderr, "a single checkpoint is what this command is for"
    code, stdout, _ = in_process("inspect", out)
    assert code == 0


def test_the_command_with_everything(app: App, source: Path, out: Path, in_process: InProcess) -> None:
    report = out.parent / "report.json"
    code, stdout, stderr = in_process(
        "refresh-bn", source, "-o", out, *app.options("score"), "--require", "loss>=0", "--report", report, "--json",
        "--bn-batches", "2", "--bn-estimator", "batch-mean", "--dtype", "float64", "-q",
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document.items() <= json.loads(report.read_text()).items()
    assert [each["name"] for each in document["evaluations"]] == [
        "weights.safetensors",
        "these weights, statistics refreshed",
    ]
    assert document["batch_norm"]["estimator"] == "batch-mean"
    assert document["batch_norm"]["batches"] == 2
    assert document["requirements"][0]["met"] is True


def test_the_command_with_an_unmet_requirement(app: App, source: Path, out: Path, in_process: InProcess) -> None:
    out.write_bytes(b"old")
    code, stdout, stderr = in_process(
        "refresh-bn", source, "-o", out, *app.options("falls"), "--require", "m>=last", "--overwrite"
    )
    assert (code, out.read_bytes(), names(out.parent)) == (9, b"old", [out.name])
    assert "NOT MET: m>=last: expected >= 1, got 0.5" in stdout
    assert "not published" in stderr
    assert "sweep" not in stderr, "there is one file, so no other checkpoints to average"


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_a_missing_model_or_data(app: App, source: Path, out: Path, in_process: InProcess, missing: str) -> None:
    words = app.options()
    at = words.index(missing)
    code, _, stderr = in_process("refresh-bn", source, "-o", out, *words[:at], *words[at + 2 :])
    assert code == 2
    assert f"Error: {missing} is missing. Add {missing} MODULE:FACTORY to measure the statistics." in stderr
    assert names(out.parent) == []


def test_a_dry_run_of_the_command(app: App, source: Path, out: Path, in_process: InProcess) -> None:
    code, stdout, _ = in_process("refresh-bn", source, "-o", out, *app.options("raises"), "--dry-run")
    assert code == 0
    assert stdout.splitlines()[0] == "would refresh weights.safetensors"
    assert stdout.splitlines()[-1].startswith(f"would write {out}")
    assert names(out.parent) == []
