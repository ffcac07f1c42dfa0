"""A run folder as a real library left it: which checkpoints count, in which order, and their exact mean."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from formats.reading import assert_same
from safetensors.torch import load_file
from system.trainers.runs import LIBRARIES, RUNS, Run, Saved, Trainers, execute, mean

from ckpt_avg import average, load_average

pytestmark = pytest.mark.trainers
Average = Callable[..., dict[str, Any]]

# What each run folder contains next to its checkpoints, and why it is no further one.
LEFT_OUT = {
    "bert": {"model.safetensors": "the run's own weights", "training_args.bin": "training state"},
    "lightning": {"last.ckpt": "last|same weights as epoch=5-step=18"},
    "lightning_metric": {"last.ckpt": "same file as epoch=5-val_loss="},
    "lightning_top": {"last.ckpt": "last|same weights as epoch=1-step=6"},
    "lightning_average": {"last.ckpt": "last|same weights as epoch=5-step=18"},
    "timm": {
        "last.pth.tar": "same file as checkpoint-4",
        "model_best.pth.tar": "same file as checkpoint-2",
        "milestone-2.pth.tar": "same file as checkpoint-1",
        "recovery-3-0.pth.tar": "recovery",
        "recovery-4-0.pth.tar": "recovery",
    },
    "timm_top": {
        "last.pth.tar": "last",  # too bad to be kept by a name of its own
        "model_best.pth.tar": "same file as checkpoint-2",
        "recovery-3-0.pth.tar": "recovery",
        "recovery-4-0.pth.tar": "recovery",
    },
    "mmengine": {"best_test_accuracy_epoch_*.pth": "same weights as epoch_"},
    "mmengine_average": {"best_test_accuracy_epoch_*.pth": "same weights as epoch_"},
}


@pytest.fixture
def averaged(tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]) -> Average:
    """Averages a run folder by the command; returns what it says."""

    def call(folder: Path, *options: object, output: str = "mean.safetensors") -> dict[str, Any]:
        arguments = (folder, "-o", tmp_path / output, "--bn", "keep", "--json", *options)
        code, out, err = in_process("average", *arguments)
        assert code == 0, err
        said: dict[str, Any] = json.loads(out)
        return said

    return call


def paths(saved: Sequence[Saved]) -> list[str]:
    return [str(each.path) for each in saved]


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_each_checkpoint_counts_once_in_the_order_of_training(run: Run, averaged: Average) -> None:
    """Not once more as last, best, milestone or copy; and no optimizer or recovery file is mistaken for weights."""
    said = averaged(run.folder)
    assert said["checkpoints"] == paths(run.checkpoints)
    reasons = {Path(each["path"]).name: each["reason"] for each in said["skipped"]}
    for pattern, reason in LEFT_OUT.get(run.name, {}).items():
        names = [name for name in reasons if Path(name).match(pattern)]
        assert names, f"{pattern} is not among {sorted(reasons)}"
        assert all(re.search(reason, reasons.pop(name)) for name in names)
    assert reasons == {}


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_the_mean_is_exact(run: Run, averaged: Average, tmp_path: Path) -> None:
    """Bit for bit, under the names of the model."""
    averaged(run.folder)
    expected = mean([saved.truth for saved in run.checkpoints])
    assert_same(load_file(tmp_path / "mean.safetensors"), expected)


@pytest.mark.parametrize("run", ["lightning_average", "timm", "timm_top", "mmengine_average"], indirect=True)
def test_ema_averages_the_averages(run: Run, averaged: Average, tmp_path: Path) -> None:
    said = averaged(run.folder, "--ema")
    assert said["checkpoints"] == paths(run.checkpoints)
    expected = mean([saved.ema for saved in run.checkpoints])
    assert_same(load_file(tmp_path / "mean.safetensors"), expected)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_mean_loads_into_the_model(library: str, trainers: Trainers, averaged: Average, tmp_path: Path) -> None:
    """By the library itself where it has a way of its own, else strictly."""
    arguments: list[object] = []
    for name in LIBRARIES[library][1]:
        (tmp_path / name).mkdir()
        averaged(trainers.run(name).folder, output=f"{name}/model.safetensors")
        arguments += [name, tmp_path / name / "model.safetensors"]
    execute(library, "load", *arguments)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_check_says_that_the_checkpoints_of_a_run_fit(
    run: Run, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = in_process("check", run.folder, "--json")
    assert code == 0, err
    said = json.loads(out)["checkpoints"]
    # Copies can be told from headers alone only where they are the same file.
    assert [path for path in said if not Path(path).name.startswith("best")] == paths(run.checkpoints)


@pytest.mark.parametrize(
    ("run", "metric", "mode"),
    [
        ("bert", "eval_loss", "min"),
        ("lightning", "val_loss", "min"),
        ("lightning_metric", "val_loss", "max"),
        ("lightning_average", "val_loss", "min"),
        ("timm", "metric", "max"),
        ("timm", "eval_top1", "max"),
        ("timm", "eval_loss", "min"),
        ("torch_zip_tutorial", "loss", "min"),
        ("torch_stream_tutorial", "loss", "max"),
    ],
    indirect=["run"],
)
def test_best_takes_what_the_librarys_own_log_ranks_first(run: Run, metric: str, mode: str, averaged: Average) -> None:
    ranked = sorted(run.checkpoints, key=lambda saved: saved.facts["metrics"][metric], reverse=mode == "max")
    said = averaged(run.folder, "--best", 2, "--metric", metric, "--mode", mode)
    assert said["checkpoints"] == paths([saved for saved in run.checkpoints if saved in ranked[:2]])


@pytest.mark.parametrize(
    ("run", "metric", "mode"), [("bert", "eval_loss", "min"), ("timm", "metric", "max")], indirect=["run"]
)
def test_the_best_is_the_one_that_the_library_calls_so(run: Run, metric: str, mode: str, averaged: Average) -> None:
    said = averaged(run.folder, "--best", 1, "--metric", metric, "--mode", mode)
    assert said["checkpoints"] == paths([saved for saved in run.checkpoints if saved.facts["best"]])


@pytest.mark.parametrize(
    "run", ["bert", "bert_sharded", "lightning", "lightning_fsdp", "mmengine", "mmengine_iter", "peft"], indirect=True
)
def test_steps_are_the_librarys_own(run: Run, averaged: Average) -> None:
    """Of a window of steps, both ends count."""
    steps = [saved.facts["step"] for saved in run.checkpoints]
    said = averaged(run.folder, "--from-step", steps[1], "--to-step", steps[-2] if len(steps) > 3 else steps[-1])
    assert said["checkpoints"] == paths(run.checkpoints[1:-1] if len(steps) > 3 else run.checkpoints[1:])


@pytest.mark.parametrize("run", ["timm", "torch_zip_tutorial"], indirect=True)
def test_epochs_stand_in_where_the_library_records_no_steps(run: Run, averaged: Average) -> None:
    last = run.checkpoints[-1].facts["epoch"]
    said = averaged(run.folder, "--from-step", last - 1)
    assert said["checkpoints"] == paths(run.checkpoints[-2:])


@pytest.mark.parametrize("run", ["bert", "lightning", "lightning_metric"], indirect=True)
def test_at_lr_minima_takes_the_ends_of_the_cycles(run: Run, averaged: Average) -> None:
    """Where the last step was taken at the lowest rate, not where the next one starts anew at the highest."""
    rates = [saved.facts["learning_rate"] for saved in run.checkpoints] + [math.inf]
    lowest = [
        saved
        for index, saved in enumerate(run.checkpoints[1:], 1)
        if rates[index - 1] > rates[index] < rates[index + 1]
    ]
    assert len(lowest) == 3
    assert averaged(run.folder, "--at-lr-minima")["checkpoints"] == paths(lowest)


@pytest.mark.parametrize(
    ("run", "lost"),
    [
        ("dcp_fsdp", ".metadata"),
        ("lightning_fsdp", ".metadata"),
        ("accelerate_fsdp", "pytorch_model_fsdp_0/.metadata"),
        ("bert_sharded", "model.safetensors.index.json"),
        ("bert", "trainer_state.json"),
    ],
    indirect=["run"],
)
def test_a_checkpoint_that_was_cut_short_is_left_out_and_named(
    run: Run, lost: str, averaged: Average, tmp_path: Path
) -> None:
    """Each of these files is the last that its library writes."""
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    cut = copy / run.checkpoints[-1].path.relative_to(run.folder)
    (cut / lost).unlink()
    said = averaged(copy)
    kept = [copy / saved.path.relative_to(run.folder) for saved in run.checkpoints[:-1]]
    assert said["checkpoints"] == list(map(str, kept))
    (reason,) = (each["reason"] for each in said["skipped"] if Path(each["path"]) == cut)
    assert "incomplete" in reason


@pytest.mark.parametrize(
    "run", ["bert", "accelerate_fsdp", "lightning_fsdp", "dcp_safetensors_consolidated"], indirect=True
)
def test_checkpoint_folders_named_by_hand_are_in_the_order_of_their_steps(run: Run, averaged: Average) -> None:
    """And not searched for further checkpoints inside."""
    said = averaged(run.checkpoints[1].path, run.checkpoints[0].path)
    assert said["checkpoints"] == paths(run.checkpoints[:2])
    assert said["skipped"] == []


@pytest.mark.parametrize("run", ["peft"], indirect=True)
def test_the_mean_of_lora_factors_comes_with_a_warning(run: Run, averaged: Average) -> None:
    """It is not the mean of what they multiply to."""
    assert any("LoRA" in notice for notice in averaged(run.folder)["notices"])


@pytest.mark.parametrize("run", ["torch_zip_averaged", "torch_stream_averaged"], indirect=True)
def test_averages_among_the_inputs_are_told(run: Run, averaged: Average) -> None:
    assert any("already an average" in notice for notice in averaged(run.folder)["notices"])


@pytest.mark.parametrize("name", ["bert", "lightning"])
def test_load_average_gives_what_average_writes(name: str, trainers: Trainers, tmp_path: Path) -> None:
    """If it failed, a script that goes on with the average would have other weights than the file."""
    run = trainers.run(name)
    found = load_average(run.folder, bn="keep")
    written = load_file(average(run.folder, tmp_path / "mean.safetensors", bn="keep").output)
    assert_same(found, written)
