"""Run folders of every trainer: the right weights and records, in the order of training, without copies."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import layouts
import pytest
from formats.reading import Command, assert_same, averaged, check_saved, listed, mean, names, read, refusal
from layouts import ONE_FILE, WITH_EMA, Maker, Run

from ckpt_avg import open_checkpoint
from ckpt_avg.formats import trainers as package
from ckpt_avg.formats.trainers.registry import TRAINERS


def test_each_file_of_a_trainer_is_in_the_list_once() -> None:
    modules = [
        importlib.import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
    ]
    assert {id(module.TRAINER) for module in modules if hasattr(module, "TRAINER")} == set(map(id, TRAINERS))
    assert len({trainer.name for trainer in TRAINERS}) == len(TRAINERS)
    assert "torch" not in {name for module in modules for name in vars(module)}


@pytest.fixture(params=ONE_FILE)
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A run of each trainer."""
    (tmp_path / "run").mkdir()
    return ONE_FILE[request.param](tmp_path / "run")


def test_each_checkpoint_is_read(trainer: Run) -> None:
    """EMA weights or moments instead of weights; a step that is not the one in the file's own name; no rate."""
    for saved in trainer.checkpoints:
        check_saved(saved, trainer.kind)
        with open_checkpoint(saved.path) as checkpoint:
            record = checkpoint.spec.record
        assert record.learning_rate == saved.learning_rate
        assert {name: record.metrics.get(name) for name in saved.metrics} == dict(saved.metrics)


def test_inspect_lists_the_run_in_the_order_of_training(trainer: Run, in_process: Command) -> None:
    """A copy, a link or an earlier average counts as a checkpoint, or 10 comes before 9."""
    shown = listed(in_process, trainer.folder)
    assert names(shown["checkpoints"]) == [saved.path.name for saved in trainer.checkpoints]
    assert set(names(shown["skipped"])) >= trainer.others
    assert all(entry["reason"] for entry in shown["skipped"])
    for entry, saved in zip(shown["checkpoints"], trainer.checkpoints, strict=True):
        assert entry["kind"] == trainer.kind
        assert (entry["step"], entry["epoch"]) == (saved.step, saved.epoch)
        assert {name: entry["metrics"].get(name) for name in saved.metrics} == pytest.approx(dict(saved.metrics))


def test_the_average_of_a_run_folder(trainer: Run, in_process: Command) -> None:
    """A copy counted twice, or a tensor of another state dict, changes the mean; --last counts no other files."""
    for last in (len(trainer.checkpoints), 2):
        expected = mean([saved.raw for saved in trainer.checkpoints[-last:]])
        assert_same(averaged(in_process, trainer.folder, "--last", last), expected)
    assert_same(averaged(in_process, trainer.folder), mean([saved.raw for saved in trainer.checkpoints]))


@pytest.mark.parametrize("name", ONE_FILE)
def test_the_stream_of_torch_before_1_6(tmp_path: Path, name: str) -> None:
    """The same contents in the older format give the same weights and the same record."""
    run = ONE_FILE[name](tmp_path, stream=True)
    for saved in run.checkpoints:
        assert saved.path.read_bytes()[:2] == b"\x80\x02"
        check_saved(saved, run.kind)


@pytest.mark.parametrize("name", WITH_EMA)
def test_ema_takes_the_running_average(tmp_path: Path, in_process: Command, name: str) -> None:
    """--ema gives the raw weights, or the other way round: two trainers swap them when they save."""
    (tmp_path / "run").mkdir()
    run = WITH_EMA[name](tmp_path / "run")
    for saved in run.checkpoints:
        assert saved.ema is not None
        assert_same(read(saved.path, ema=True), saved.ema)
        with open_checkpoint(saved.path) as raw, open_checkpoint(saved.path, ema=True) as ema:
            assert raw.spec.state_key != ema.spec.state_key
            assert any("--ema" in note for note in raw.spec.notes), raw.spec.notes
            assert any("EMA" in note for note in ema.spec.notes), ema.spec.notes
    assert_same(averaged(in_process, run.folder, "--ema"), mean([saved.ema or {} for saved in run.checkpoints]))


@pytest.mark.parametrize("name", ["espnet2", "wenet", "opennmt", "detectron2", "composer", "tutorial"])
def test_ema_is_refused_without_a_running_average(tmp_path: Path, name: str) -> None:
    """--ema silently gives raw weights."""
    path = ONE_FILE[name](tmp_path).checkpoints[0].path
    assert "--ema" in refusal(path, ema=True)


@pytest.mark.parametrize(
    ("make", "metric", "mode"),
    [
        (layouts.fairseq, "val_loss", "min"),
        (layouts.timm, "eval_top1", "max"),  # of each epoch, in summary.csv; files have only timm's own metric
        (layouts.wenet, "cv_loss", "min"),  # in a YAML file, whose configuration has numbers of the same names
        (layouts.ultralytics, "fitness", "max"),
        (layouts.hf_trainer, "eval_loss", "min"),
    ],
)
def test_the_best_by_a_metric_that_the_trainer_records(
    tmp_path: Path, in_process: Command, make: Maker, metric: str, mode: str
) -> None:
    (tmp_path / "run").mkdir()
    run = make(tmp_path / "run")
    found = averaged(in_process, run.folder, "--best", 2, "--metric", metric, "--mode", mode)
    assert_same(found, mean([saved.raw for saved in run.checkpoints[-2:]]))
