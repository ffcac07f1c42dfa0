"""What the name of a checkpoint tells: where the run stood, how good it was, whether it is another's second name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.file_names import (
    ends_in_a_number,
    is_alias,
    is_average,
    names_a_moment,
    part_of,
    record_from_name,
    series_of,
    stem,
    trainer_from_name,
)
from ckpt_avg.formats.trainers.name_patterns import SUFFIXES


@pytest.mark.parametrize(
    ("name", "step", "epoch"),
    [
        # transformers, accelerate
        ("checkpoint-500", 500, None),
        ("checkpoint_3", 3, None),
        # Lightning
        ("epoch=3-step=100.ckpt", 100, 3),
        ("epoch=3-step=100-v1.ckpt", 100, 3),
        ("epoch=2-val_loss=0.12.ckpt", None, 2),
        # timm, torchvision, fairseq
        ("checkpoint-12.pth.tar", 12, None),
        ("model_12.pth", 12, None),
        ("checkpoint12.pt", 12, None),
        ("checkpoint_12_5000.pt", 5000, 12),
        # ESPnet2, WeNet, icefall, OpenNMT-py
        ("12epoch.pth", None, 12),
        ("12.pt", 12, None),
        ("epoch_12.pt", None, 12),
        ("epoch-12.pt", None, 12),
        ("checkpoint-4000.pt", 4000, None),
        ("run_step_4000.pt", 4000, None),
        # Ultralytics, mmengine, detectron2, Composer
        ("epoch3.pt", None, 3),
        ("epoch_12.pth", None, 12),
        ("iter_4000.pth", 4000, None),
        ("model_0004999.pth", 4999, None),
        ("ep1-ba100-rank0.pt", 100, 1),
        ("my-run-ep1-ba100.pt", 100, 1),
        # by hand
        ("step_9.safetensors", 9, None),
        ("global_step100", 100, None),
        ("EPOCH_7.PT", None, 7),
        ("snapshot7.pt", 7, None),
        ("model_2k.pt", 2000, None),
        ("ckpt-3M.pt", 3_000_000, None),
        ("net_batch32_epoch_2.pth", None, 2),
        ("batch=32.pt", 32, None),
        # nothing
        ("model.safetensors", None, None),
        ("last.ckpt", None, None),
        ("resnet50.pth", None, None),
        ("resnet50-0676ba61.pth", None, None),
        ("gpt_4k.pt", None, None),
        ("net_batch32.pth", None, None),
        ("wav2vec2.pt", None, None),
        ("v1.9", None, None),
        ("²epoch.pth", None, None),
        ("step_²", None, None),
        ("step_٣.pt", 3, None),
        ("2024-05-01.pt", None, None),
        ("run-2024-05-01_12-00-30.ckpt", None, None),
        ("weights.12-0.34.pt", None, 12),
        ("", None, None),
        (".pt", None, None),
    ],
)
def test_step_and_epoch(name: str, step: int | None, epoch: int | None) -> None:
    """A number that belongs to the model's own name (resnet50), a date, a version or a metric is no step."""
    found = record_from_name(name)
    assert (found.step, found.epoch) == (step, epoch)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("epoch=2-val_loss=0.12.ckpt", {"val_loss": 0.12}),
        ("epoch=2-val_loss=0.12-v3.ckpt", {"val_loss": 0.12}),
        ("epoch=2-step=7-val/acc=0.5.ckpt", {"val/acc": 0.5}),
        ("epoch=2_val_loss=0.12.ckpt", {"val_loss": 0.12}),
        ("model_epoch_10_val_loss=0.12.pt", {"val_loss": 0.12}),
        ("step5_loss=0.5_acc=0.25.pt", {"loss": 0.5, "acc": 0.25}),
        ("a=1-b=-2.5-c=1e-3.ckpt", {"a": 1.0, "b": -2.5, "c": 0.001}),
        ("best-epoch=3-f1=0.9.pt", {"f1": 0.9}),
        ("checkpoint.best_loss_3.2150.pt", {"loss": 3.215}),
        ("checkpoint.best_wer_12.3450.pt", {"wer": 12.345}),
        ("best_model_5_val_loss=-0.3452.pt", {"val_loss": -0.3452}),
        ("epoch=1-val_loss=+1.5E-03.ckpt", {"val_loss": 0.0015}),
        ("epoch12-val_loss0.45.pth", {"val_loss": 0.45}),
        ("loss12.34.pt", {"loss": 12.34}),
        ("model_acc1_78.5.pt", {"acc1": 78.5}),
        ("net_mse_-1e-05.pt", {"net_mse": -1e-05}),
        ("weights.05-0.34.pt", {"score": 0.34}),
        ("weights.06--1.2e-05.pt", {"score": -1.2e-05}),
        ("ema_0.9999_010000.pt", {}),
        ("val_loss=inf.ckpt", {}),
        ("val_loss=1e999.ckpt", {}),
        ("step=3.ckpt", {}),
        ("model.pt", {}),
    ],
)
def test_metrics(name: str, metrics: dict[str, float]) -> None:
    """As Lightning and fairseq write them; what is no finite number is no metric."""
    assert dict(record_from_name(name).metrics) == metrics


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model_final.rank_1.pth", "model_final.rank_0.pth"),
        ("pytorch_model_tp_0_pp_1.bin", "pytorch_model_tp_0_pp_0.bin"),
        ("m_tp0_ep3.pt", "m_tp0_ep2.pt"),
        ("ep_1_tp_0.pt", "ep_0_tp_0.pt"),
        ("state_gpu09.pt", "state_gpu10.pt"),
        ("ckpt-00001-of-00002.pt", "ckpt-00001-of-00002.pt"),
        ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_0.pt"),
    ],
)
def test_numbers_of_parts_are_no_steps(name: str, other: str) -> None:
    """Ranks mistaken for steps would be averaged, and the mean of two parts of a model is no model."""
    assert other in part_of(name)
    assert record_from_name(name) == Record()


@pytest.mark.parametrize(
    ("name", "other"),
    [("consolidated.00.pth", "consolidated.01.pth"), ("checkpoint_10.th.2", "checkpoint_10.th"),
     ("checkpoint_10.th", "checkpoint_10.th.1"), ("pytorch_model.bin.1.pt", "pytorch_model.bin.0.pt")],
)  # fmt: skip
def test_parts_of_other_names(name: str, other: str) -> None:
    assert other in part_of(name)


@pytest.mark.parametrize(
    "name",
    [
        "step_5.pt",
        "lowrank_8.pt",
        "apartment_2.pt",
        "model_ep_1.pt",
        "x-00001-of-00001.pt",
        "12layers_2.pt",
        "gpt_8gpu-1.pt",
    ],
)
def test_names_that_tell_no_part(name: str) -> None:
    assert part_of(name) == [f"{name}.1"]


@pytest.mark.parametrize(
    ("name", "series"),
    [("fold_3.pt", "fold_3"), ("model_seed42_epoch_1.pt", "seed_42"), ("cv1_run02.pt", "cv_1 run_2"), ("step_3.pt", ""),
     ("run_00001000.pt", ""), ("unfold_3.pt", ""), ("prune1.pt", "")],
)  # fmt: skip
def test_series(name: str, series: str) -> None:
    """A number of five digits and more is a step, whatever comes before it."""
    assert series_of(name) == series


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("checkpoint-500", True), ("step1000-unsharded", True), ("iter_0000100", True), ("epoch=0-val", True),
     ("m--val_loss=1.5", True), ("CKPT+2024-05-01+10-20-30+00", True), ("out_2", False), ("100", False),
     ("2_Dense", False), ("version_3", False), ("fold_1", False), ("tp_rank_00_pp_rank_000", False), ("lr=0.1", False),
     ("batch_32", False), ("steps=1000,lr=0.1", False), ("alpha=0.5", False)],
)  # fmt: skip
def test_folders_that_name_a_moment(folder: str, expected: bool) -> None:
    """Folders of trainings with other settings would be averaged as checkpoints of one."""
    assert names_a_moment(folder) is expected


@given(st.integers(0, 10**17), st.integers(0, 10**6), st.sampled_from(SUFFIXES))
def test_names_with_both_give_both_back(step: int, epoch: int, suffix: str) -> None:
    assert record_from_name(f"epoch={epoch}-step={step}{suffix}") == Record(step, epoch)
    assert record_from_name(f"step={step:08}{suffix}") == Record(step)


@given(st.text("ab_-=. /e3٣²\0\ud800é", max_size=40))
def test_any_name_is_looked_at_without_an_error(name: str) -> None:
    """Names come from anywhere, digits of other scripts and endless numbers among them."""
    found = record_from_name(name)
    assert all(isinstance(value, float) for value in found.metrics.values())
    assert isinstance(is_alias(name), bool)
    assert isinstance(is_average(name), bool)
    assert name.startswith(stem(name))


@pytest.mark.parametrize("name", ["9" * 5000, "step_" + "9" * 5000, "loss=" + "9" * 5000, "epoch=" + "9" * 300 + ".pt"])
def test_endless_numbers_tell_nothing(name: str) -> None:
    """Python turns no text of more than 4,300 digits into an integer: that must be no crash."""
    found = record_from_name(name)
    assert (found.step, found.epoch, dict(found.metrics)) == (None, None, {})


def test_stems() -> None:
    assert [stem(f"a.b{suffix}") for suffix in SUFFIXES] == ["a.b"] * len(SUFFIXES)
    assert stem("A.SAFETENSORS") == "A"
    assert [stem(f"a{suffix}") for suffix in (".pyth", ".tar", ".t7", ".th", ".dnn")] == ["a"] * 5
    assert [stem(name) for name in ("v1.9", "a.best", "a.ep3")] == ["v1.9", "a.best", "a.ep3"]
    assert stem("a.pth.tar") == "a", "not a.pth"


@pytest.mark.parametrize(
    "name",
    ["last.ckpt", "last-v1.ckpt", "latest.pt", "latest-rank0.pt", "best.pt", "model_best.pth.tar", "model_final.pth",
     "checkpoint_best.pt", "checkpoint_last.pt", "checkpoint.pth", "checkpoint.pth.tar", "valid.acc.best.pth",
     "Best.pt", "resnet50_best.pth", "unet3_last-v2.ckpt"],
)  # fmt: skip
def test_aliases(name: str) -> None:
    """Second names, under which trainers keep some checkpoint once more."""
    assert is_alias(name)


@pytest.mark.parametrize(
    "name",
    ["best-epoch=3.ckpt", "checkpoint.best_loss_3.2150.pt", "model_12.pth", "lasting.pt", "bestiary.pt", "model.pt",
     "checkpoint-1.pth.tar", "finalist_model.pt", "best_1.pt", "best_0.91.pt", "resnet50_best_0.91.pt",
     "best-val_loss=0.5.ckpt"],
)  # fmt: skip
def test_no_aliases(name: str) -> None:
    """A name with a number of its own may be the only one of that checkpoint."""
    assert not is_alias(name)


@pytest.mark.parametrize(
    "name",
    ["valid.acc.ave_10best.pth", "valid.acc.ave.pth", "avg_10.pt", "avg10.pt", "final_avg.pt", "swa.safetensors",
     "model-swa.pt", "average.pt", "averaged.pt", "epoch-30-avg-9.pt", "SWA.BIN", "model_avg5.pt", "swa_model.pt"],
)  # fmt: skip
def test_averages(name: str) -> None:
    """As WeNet, ESPnet2, icefall and people call them."""
    assert is_average(name)


@pytest.mark.parametrize(
    "name",
    ["wave_1.pt", "wavenet.pt", "swan.pt", "pavement.pt", "avgpool_resnet_1.pt", "savery.pt", "step_1.pt", "slave.pt",
     "swag_1.pt", "octave.pt", "avg_val_loss=0.5.ckpt", "epoch=3-avg_val_loss=0.5.ckpt", "vit_avg_pool_epoch_3.pt",
     "avg_meter_2.pt"],
)  # fmt: skip
def test_no_averages(name: str) -> None:
    """Left out of a run for its name's sake alone, a checkpoint would be lost."""
    assert not is_average(name)


def test_trainers_of_bare_state_dicts(tmp_path: Path) -> None:
    def trainer(name: str) -> str | None:
        found = trainer_from_name(tmp_path / name)
        return found and found.name

    (tmp_path / "3.yaml").touch()
    (tmp_path / "epoch_4.yaml").touch()
    assert trainer("12epoch.pth") == "ESPnet2"
    assert trainer("3.pt") == "WeNet"
    assert trainer("epoch_4.pt") == "WeNet"
    for name in ("5.pt", "3.pth", "epoch_12.pth", "12epoch.pt", "model.pt"):
        assert trainer(name) is None, name


@pytest.mark.parametrize(
    "pattern",
    ["yolov8n_{}", "model_n_{}", "out-{}", "step{}", "epoch_{}", "checkpoint-{}", "resnet50_{}", "run3_{}", "seed42_{}",
     "lr0.001_{}", "ep-{}", "model.{}", "{}", "net_{}_G", "v1.5_{}", "2024-05-01-{}", "gpt2_{}k", "top5_{}", "mp3_{}",
     "run_{}", "agent-{}", "8gpu_{}"],
)  # fmt: skip
def test_the_numbers_of_one_pattern_are_judged_alike(pattern: str) -> None:
    """A part of a series would be missing, and the newest of it more often than not."""
    names = [pattern.format(number) for number in (1, 2, 9, 10, 11, 99, 100, 1000, 20000)]
    assert len({(names_a_moment(name), ends_in_a_number(name)) for name in names}) == 1
    records = [record_from_name(name) for name in names]
    steps = [record.step if record.epoch is None else record.epoch for record in records]
    assert steps == sorted(steps, key=lambda step: step or 0)
    assert len(set(steps)) in (1, len(steps))
