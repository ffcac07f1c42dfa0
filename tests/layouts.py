"""Makers of run folders with the file names, keys and nesting that trainers' own code writes, and what is true of them.

Each maker fills a folder and returns a `Run`: the checkpoints in the order of training, with their raw and EMA weights,
and the other files, which are no further checkpoint. Nothing of a trainer is imported: classes that its pickles
name come from modules that exist only while a file is written.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import sys
import tarfile
import types
import warnings
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """One checkpoint of a run, and what is true of it."""

    path: Path
    raw: State
    ema: State | None = None
    state_key: str | None = None
    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None


@dataclass(frozen=True)
class Run:
    """A run folder: its checkpoints in order, and the files that must not be averaged with them."""

    folder: Path
    kind: str | None
    checkpoints: list[Saved]
    others: frozenset[str] = frozenset()


Maker = Callable[..., Run]


def run_of(kind: str | None, *others: str) -> Callable[[Callable[..., Iterator[Saved]]], Maker]:
    """Turns a function that writes checkpoints one after another into a maker of a run."""

    def wrap(write: Callable[..., Iterator[Saved]]) -> Maker:
        @wraps(write)
        def make(folder: Path, *arguments: Any, **options: Any) -> Run:
            return Run(folder, kind, list(write(folder, *arguments, **options)), frozenset(others))

        return make

    return wrap


# --- weights -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small model with a BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)


def net(seed: int) -> Net:
    """A model with weights and statistics of its own."""
    made = Net()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            else:
                tensor.fill_(100 * seed)
    return made


def state(seed: int) -> dict[str, torch.Tensor]:
    """The state dict of that model."""
    return {name: tensor.clone() for name, tensor in net(seed).state_dict().items()}


def ordered(weights: State, prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    """What ``state_dict()`` returns: an OrderedDict with ``_metadata``."""
    made = OrderedDict((prefix + name, tensor) for name, tensor in weights.items())
    made._metadata = OrderedDict({"": {"version": 1}, "bn": {"version": 2}})  # type: ignore[attr-defined]
    return made


def adam(lr: float = 0.001) -> dict[str, Any]:
    """The state of a real optimizer after a step: tensors that are no weights."""
    model = net(99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def rng() -> dict[str, Any]:
    """The state of random generators, as trainers save it."""
    return {
        "python": random.Random(0).getstate(),
        "numpy": np.random.RandomState(0).get_state(),
        "torch": torch.get_rng_state(),
    }


def save(contents: object, path: Path, *, stream: bool = False, buffered: bool = False, protocol: int = 2) -> Path:
    """``torch.save``; as a stream, the format of torch before 1.6; buffered, by way of an open file."""
    options: dict[str, Any] = {"_use_new_zipfile_serialization": not stream, "pickle_protocol": protocol}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without source, in a stream
        if buffered:
            with path.open("wb") as file:
                torch.save(contents, file, **options)
        else:
            torch.save(contents, path, **options)
    return path


@contextmanager
def throwaway(module: str, **members: type) -> Iterator[types.ModuleType]:
    """A module with these classes that can be pickled by name, and is gone afterwards."""
    packages = [".".join(module.split(".")[: count + 1]) for count in range(module.count(".") + 1)]
    assert not any(name in sys.modules for name in packages)
    for name in packages:
        sys.modules[name] = types.ModuleType(name)
    for name, member in members.items():
        member.__module__, member.__qualname__ = module, name
        setattr(sys.modules[module], name, member)
    try:
        yield sys.modules[module]
    finally:
        for name in packages:
            del sys.modules[name]


# --- one file per checkpoint -------------------------------------------------------------------------------


@run_of("torchvision", "checkpoint.pth")
def torchvision(folder: Path, *, stream: bool = False, ema: bool = True) -> Iterator[Saved]:
    """references/classification/train.py: model_<epoch>.pth, and checkpoint.pth with what the last one holds."""
    for epoch in range(8, 11):
        model, average = net(epoch), AveragedModel(net(50 + epoch), use_buffers=True)
        average.n_averaged.fill_(32 * epoch)
        contents = {
            "model": model.state_dict(),
            "optimizer": adam(lr=0.1 / epoch),
            "lr_scheduler": {"step_size": 30, "gamma": 0.1, "base_lrs": [0.5], "last_epoch": epoch + 1},
            "epoch": epoch,
            "args": Namespace(data_path="/data", model="net", device="cuda", epochs=90, lr=0.5, output_dir="."),
        }
        if ema:
            contents["model_ema"] = average.state_dict()
        contents["scaler"] = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
        path = save(contents, folder / f"model_{epoch}.pth", stream=stream)
        save(contents, folder / "checkpoint.pth", stream=stream)
        weights = state(50 + epoch) if ema else None
        yield Saved(path, state(epoch), weights, "model", epoch=epoch, learning_rate=0.1 / epoch)


@run_of("fairseq", "checkpoint_best.pt", "checkpoint.best_loss_3.2150.pt", "checkpoint_last.pt")
def fairseq(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """fairseq/trainer.py and checkpoint_utils.py: of a moment's several names, all but the first are copies."""
    # At the end of an epoch the iterator already counts the next one.
    moments = [("checkpoint_11_5000.pt", 5000, 11, 11, 3.5, 420), ("checkpoint11.pt", 5100, 11, 12, 3.4, 0)]
    moments += [("checkpoint12.pt", 5610, 12, 13, 3.215, 0), ("checkpoint13.pt", 6120, 13, 14, 3.25, 0)]
    for seed, (name, updates, epoch, next_epoch, loss, done) in enumerate(moments):
        extra = {
            "metrics": {"train": [(10, "loss", "AverageMeter", {"val": torch.tensor(3.0), "sum": torch.tensor(9.0)})]},
            "previous_training_time": 1234.5, "ema": ordered(state(50 + seed)),
            "train_iterator": {"version": 2, "epoch": next_epoch, "iterations_in_epoch": done, "shuffle": True},
            "val_loss": loss, "best": min(loss, 3.215) if seed > 1 else loss,
        }  # fmt: skip
        contents = {
            "args": None,
            "cfg": {"_name": None, "common": {"fp16": True, "seed": 1}, "optimization": {"lr": [0.0005]},
                    "checkpoint": {"best_checkpoint_metric": "loss", "maximize_best_checkpoint_metric": False},
                    "model": Namespace(arch="transformer", encoder_layers=6)},
            "model": ordered(state(seed)), "criterion": None, "task_state": {}, "extra_state": extra,
            "optimizer_history": [{
                "criterion_name": "LabelSmoothedCrossEntropyCriterion", "num_updates": updates,
                "optimizer_name": "MemoryEfficientFP16Optimizer", "lr_scheduler_state": {"best": loss},
            }],
            "last_optimizer_state": {**adam(lr=0.0004), "loss_scale": 128.0},
        }  # fmt: skip
        path = save(contents, folder / name, stream=stream, buffered=True)
        if loss == 3.215:
            for copy in ("checkpoint_best.pt", "checkpoint.best_loss_3.2150.pt"):
                shutil.copyfile(path, folder / copy)
        shutil.copyfile(path, folder / "checkpoint_last.pt")
        yield Saved(path, state(seed), state(50 + seed), "model", updates, epoch, {"val_loss": loss}, 0.0004)


@run_of(
    "ESPnet2",
    *(f"valid.acc.{name}.pth" for name in ("ave_10best", "ave", "ave_1best", "best")),
    "latest.pth",
    "checkpoint.pth",
)
def espnet2(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """espnet2/train/trainer.py and main_funcs/average_nbest_models.py."""
    accuracies = {1: 0.5, 2: 0.75, 3: 0.625, 10: 0.6875}
    stats = {
        epoch: {"train": {"loss": 2.0, "iter_time": 0.1}, "valid": {"acc": value, "loss": 3 - value}}
        for epoch, value in accuracies.items()
    }
    for epoch in accuracies:
        path = save(ordered(state(epoch)), folder / f"{epoch}epoch.pth", stream=stream)
        yield Saved(path, state(epoch), None, None, epoch=epoch)
    contents = {
        "model": ordered(state(10)),
        "reporter": {"stats": stats, "epoch": 10},
        "optimizers": [adam()],
        "schedulers": [{"warmup_steps": 25000, "last_epoch": 4000, "_last_lr": [0.001]}],
        "scaler": None,
    }
    save(contents, folder / "checkpoint.pth", stream=stream)
    save(ordered(state(77)), folder / "valid.acc.ave_10best.pth", stream=stream)
    (folder / "valid.acc.ave.pth").symlink_to("valid.acc.ave_10best.pth")
    (folder / "valid.acc.ave_1best.pth").symlink_to("2epoch.pth")
    (folder / "valid.acc.best.pth").symlink_to("2epoch.pth")
    (folder / "latest.pth").symlink_to("10epoch.pth")
    (folder / "config.yaml").write_text("accum_grad: 1\nkeep_nbest_models: 10\n")
    (folder / "train.log").write_text("")


def wenet_yaml(epoch: int, step: int, loss: float, learning_rate: float, tag: str) -> str:
    """What PyYAML writes for a checkpoint: the whole configuration and a few numbers."""
    return f"""accum_grad: 4
cmvn_conf:
  is_json_cmvn: true
cv_loss: {loss!r}
dataset_conf:
  batch_conf:
    batch_size: 16
  step: 7
encoder_conf:
  epoch: 99
epoch: {epoch}
init_infos: {{}}
loss_dict:
  acc: {1 - loss / 8!r}
  loss: {loss!r}
  loss_ctc: 12.5
lr: {learning_rate!r}
max_epoch: 100
optim_conf:
  lr: 0.002
save_time: 01/02/2024 10:11:12
special_tokens:
  <blank>: 0
  <unk>: 1
step: {step}
tag: '{tag}'
"""


@run_of("WeNet", "avg_10.pt", "final.pt", "init.pt")
def wenet(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """wenet/bin/train.py: N.pt with N.yaml next to it, and an average that average_model.py made."""
    save(ordered(state(98)), folder / "init.pt", stream=stream)
    (folder / "init.yaml").write_text("accum_grad: 4\ninit_infos: {}\nsave_time: 01/02/2024 10:00:00\ntag: init\n")
    (folder / "train.yaml").write_text("accum_grad: 4\nmax_epoch: 100\n")
    for epoch, loss in ((8, 4.5), (9, 4.0), (10, 4.25)):
        path = save(ordered(state(epoch)), folder / f"{epoch}.pt", stream=stream)
        text = wenet_yaml(epoch, 1000 * (epoch + 1), loss, 0.001 / epoch, str(epoch))
        path.with_suffix(".yaml").write_text(text)
        metrics = {"cv_loss": loss, "loss": loss, "acc": 1 - loss / 8}
        yield Saved(path, state(epoch), None, None, 1000 * (epoch + 1), epoch, metrics, learning_rate=0.001 / epoch)
    save(state(97), folder / "avg_10.pt", stream=stream)
    (folder / "final.pt").symlink_to("10.pt")


@run_of("icefall", "best-valid-loss.pt", "best-train-loss.pt")
def icefall(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """icefall/checkpoint.py and a recipe's train.py: every parameter of the run is at the top of the file."""
    moments = [("epoch-1.pt", 1, 3000, 0.5), ("checkpoint-4000.pt", 2, 4000, 0.45), ("epoch-2.pt", 2, 6000, 0.4)]
    for seed, (name, epoch, batches, loss) in enumerate([*moments, ("epoch-10.pt", 10, 30000, 0.42)]):
        contents = {
            "model": ordered(state(seed)),
            "optimizer": adam(lr=0.03),
            "scheduler": {"base_lrs": [0.045], "epoch": epoch, "batch": batches, "verbose": False},
            "grad_scaler": {"scale": 1024.0, "_growth_tracker": 3},
            "sampler": {"epoch": epoch, "drop_last": True, "world_size": 1, "diagnostics": {}},
            "model_avg": ordered(state(50 + seed)),
            "best_train_loss": loss, "best_valid_loss": min(loss, 0.4) if seed > 1 else loss,
            "best_train_epoch": epoch, "best_valid_epoch": min(epoch, 2), "batch_idx_train": batches,
            "log_interval": 50, "valid_interval": 3000, "cur_epoch": epoch, "train_loss": loss,
            "env_info": {"k2-version": "1.24.4", "torch-version": "2.2.0", "icefall-git-date": None},
            "exp_dir": PosixPath("zipformer/exp"), "encoder_dim": "192,256,384", "use_fp16": True,
        }  # fmt: skip
        path = save(contents, folder / name, stream=stream)
        if name == "epoch-2.pt":
            shutil.copyfile(path, folder / "best-valid-loss.pt")
            shutil.copyfile(path, folder / "best-train-loss.pt")
        yield Saved(path, state(seed), state(50 + seed), "model", batches, epoch, {"train_loss": loss}, 0.03)


@run_of("OpenNMT-py")
def opennmt(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """onmt/models/model_saver.py: the last layer is apart, under ``generator``."""
    for step in (5000, 10000, 100000):
        weights = {name.replace("head.", "generator."): tensor for name, tensor in state(step // 5000).items()}
        contents = {
            "model": {name: tensor for name, tensor in weights.items() if "generator" not in name},
            "generator": ordered({key[10:]: tensor for key, tensor in weights.items() if key.startswith("generator.")}),
            "vocab": {"src": ["<unk>", "<s>", "</s>", "a"], "tgt": ["<unk>", "<s>", "b"], "data_task": "seq2seq"},
            "opt": Namespace(save_model="run/model", train_steps=100000, learning_rate=2.0, optim="adam"),
            "optim": {"training_step": step + 1, "decay_step": step + 1, "optimizer": adam(lr=0.0007)},
        }
        path = save(contents, folder / f"model_step_{step}.pt", stream=stream)
        yield Saved(path, weights, None, "model", step, learning_rate=0.0007)


def yolo(seed: int) -> nn.Module:
    """A model with what a state dict must and must not take: nested, shared, absent and transient tensors."""
    head = nn.Linear(3, 2, bias=False)
    made = nn.Module()
    made.model = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Sequential(nn.SiLU(), head))
    made.again = head
    made.register_buffer("anchors", torch.rand(2, 2))
    made.register_buffer("transient", torch.rand(5), persistent=False)
    made.register_buffer("absent", None)
    made.register_parameter("missing", None)
    made.stride = torch.tensor([8.0, 16.0, 32.0])  # an attribute, no buffer
    made.names = {0: "person", 1: "bicycle"}
    made.args = Namespace(imgsz=640)
    made.load_state_dict(
        {
            name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))
            if tensor.is_floating_point()
            else torch.full_like(tensor, seed)
            for name, tensor in made.state_dict().items()
        }
    )
    return made.half()


@run_of("Ultralytics", "best.pt", "last.pt")
def ultralytics(folder: Path, *, stream: bool = False, stripped: bool = False) -> Iterator[Saved]:
    """ultralytics/engine/trainer.py: the EMA module itself, in float16; stripped: as the end of training leaves it."""
    for epoch, fitness in ((2, 0.25), (3, 0.5), (10, 0.375)):
        model = yolo(epoch)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        contents: dict[str, Any] = {
            "epoch": epoch,
            "best_fitness": fitness,
            "model": None,
            "ema": model,
            "updates": 100 * epoch,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.01 / epoch, "momentum": 0.9, "params": [0, 1]}]},
            "scaler": {},
            "train_args": {"task": "detect", "epochs": 100, "lr0": 0.01, "device": None, "project": None},
            "train_metrics": {"metrics/mAP50-95(B)": fitness - 0.125, "val/box_loss": 1.5, "fitness": fitness},
            "train_results": {"epoch": [1.0, 2.0], "train/box_loss": [2.0, 1.5]},
            "date": "2024-05-01T10:00:00.000000", "version": "8.3.0", "license": "AGPL-3.0",
            "git": {"root": "/repo", "branch": "main", "commit": "abc", "origin": "url"},
        }  # fmt: skip
        if stripped:
            contents |= {"epoch": -1, "model": model, "ema": None, "optimizer": None, "best_fitness": None}
            contents |= {"updates": None, "scaler": None}
        with throwaway("ultralytics.nn.tasks", DetectionModel=type("DetectionModel", (nn.Module,), {})) as module:
            model.__class__ = module.DetectionModel  # type: ignore[assignment]
            path = save(contents, folder / f"epoch{epoch}.pt", stream=stream, buffered=True)
        if fitness == 0.5:
            shutil.copyfile(path, folder / "best.pt")
        shutil.copyfile(path, folder / "last.pt")
        key, at, rate = ("model", None, None) if stripped else ("ema", epoch, 0.01 / epoch)
        yield Saved(path, weights, None, key, None, at, {"fitness": fitness}, rate)


def history_buffer() -> type:
    """The class that mmengine keeps its logged numbers in: numpy arrays inside an object."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self._max_length = 1000000
            self._log_history = np.linspace(2.0, 1.0, 12)
            self._count_history = np.ones(12, dtype=np.int64)
            self._statistics_methods: OrderedDict[str, object] = OrderedDict()

    return HistoryBuffer


@run_of("mmengine", "best_coco_bbox_mAP_epoch_9.pth")
def mmengine(folder: Path, *, stream: bool = False, ema: bool = False, by_epoch: bool = True) -> Iterator[Saved]:
    """mmengine/runner/runner.py and hooks: with EMAHook, ``state_dict`` holds the EMA weights, swapped by name."""
    for seed, (epoch, iteration) in enumerate(((8, 8000), (9, 9000), (12, 12000))):
        raw, average = state(seed), state(50 + seed)
        contents: dict[str, Any] = {
            "meta": {
                "epoch": epoch, "iter": iteration, "cfg": "model = dict(type='Net')\nepoch = 300\n", "seed": 42,
                "experiment_name": "net_20240501", "time": "20240501_101112", "mmengine_version": "0.10.7",
                "dataset_meta": {"classes": ("cat", "dog"), "palette": [(220, 20, 60)]},
            },
            "state_dict": ordered(average if ema else raw),
        }  # fmt: skip
        with throwaway("mmengine.logging.history_buffer", HistoryBuffer=history_buffer()) as module:
            contents["message_hub"] = {
                "log_scalars": OrderedDict({"train/loss": module.HistoryBuffer(), "train/lr": module.HistoryBuffer()}),
                "runtime_info": OrderedDict(epoch=epoch - 1, iter=iteration, max_epochs=300, best_score=0.5),
                "resumed_keys": OrderedDict({"train/loss": True}),
            }
            contents["optimizer"] = adam(lr=0.02)
            contents["param_schedulers"] = [{"last_step": iteration, "_global_step": iteration + 1, "factor": 1.0}]
            if ema:
                contents["ema_state_dict"] = OrderedDict(steps=torch.tensor(iteration), **ordered(raw, "module."))
            name = f"epoch_{epoch}.pth" if by_epoch else f"iter_{iteration}.pth"
            path = save(contents, folder / name, stream=stream, buffered=True)
            if epoch == 9:  # a second saving of the same weights, without the optimizer
                lean = {key: value for key, value in contents.items() if key not in ("optimizer", "param_schedulers")}
                save(lean, folder / f"best_coco_bbox_mAP_{name}", stream=stream, buffered=True)
        (folder / "last_checkpoint").write_text(f"/old/machine/work_dirs/net/{name}")
        key = "ema_state_dict" if ema else "state_dict"
        yield Saved(path, raw, average if ema else None, key, iteration, epoch, {}, 0.02)


@run_of("detectron2", "model_final.pth")
def detectron2(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """fvcore/common/checkpoint.py; of the last iteration there are two files."""
    for seed, iteration in enumerate((4999, 9999, 14999)):
        weights: dict[str, Any] = ordered(state(seed))
        contents = {
            "model": weights,
            "optimizer": adam(lr=0.02),
            "scheduler": {"base_lrs": [0.02], "last_epoch": iteration + 1, "_last_lr": [0.02]},
            "iteration": iteration,
        }
        names = [f"model_{iteration:07d}.pth"] + (["model_final.pth"] if iteration == 14999 else [])
        for name in names:
            save(contents, folder / name, stream=stream, buffered=True)
            (folder / "last_checkpoint").write_text(name)
        yield Saved(folder / names[0], state(seed), None, "model", iteration, learning_rate=0.02)
    (folder / "metrics.json").write_text('{"iteration": 19, "lr": 0.02, "total_loss": 2.5}\n')
    (folder / "config.yaml").write_text("MODEL:\n  WEIGHTS: ''\n")


@run_of("Composer", "latest-rank0.pt")
def composer(folder: Path, *, stream: bool = False, ema: bool = False) -> Iterator[Saved]:
    """composer/utils/checkpoint.py and core/state.py; its EMA algorithm swaps the weights before they are saved."""
    for epoch, batch in ((1, 100), (2, 200), (10, 1000)):
        raw, average = state(epoch), state(50 + epoch)
        algorithms: list[tuple[str, dict[str, Any]]] = [("LabelSmoothing", {"repr": "LabelSmoothing(0.1)"})]
        if ema:
            parameters = {name for name, _ in Net().named_parameters()}
            model = {
                "named_parameters_dict": {f"module.{name}": raw[name] for name in raw if name in parameters},
                "named_buffers_dict": {f"module.{name}": raw[name] for name in raw if name not in parameters},
            }
            algorithms += [("EMA", {"repr": "EMA()", "ema_model": model, "ema_weights_active": True})]
        contents = {
            "state": {
                "model": dict(ordered(average if ema else raw, "module.")),  # ComposerClassifier.module
                "optimizers": {"DecoupledAdamW": {"state": {"module.conv.weight": {"step": torch.tensor(3.0)}},
                                                  "param_groups": [{"lr": 0.0005, "params": ["module.conv.weight"]}]}},
                "schedulers": {"LambdaLR": {"base_lrs": [0.001], "last_epoch": batch, "lr_lambdas": [None]}},
                "algorithms": algorithms,
                "callbacks": {"CheckpointSaver": {"all_saved_checkpoints_to_timestamp": [("ep1-ba100-rank0.pt", {})]}},
                "timestamp": {
                    "Timestamp": {
                        "iteration": 0, "epoch": epoch, "batch": batch, "sample": 32 * batch, "token": 0,
                        "epoch_in_iteration": epoch, "batch_in_epoch": 0, "sample_in_epoch": 0,
                    }
                },
                "rank_zero_seed": 17,
                "train_metrics": {"MulticlassAccuracy": {"state_dict": {"tp": torch.tensor(7)}, "_computed": None}},
                "eval_metrics": {"eval": {"MulticlassAccuracy": {"state_dict": {"tp": torch.tensor(5)},
                                                                 "_computed": torch.tensor(0.5)}}},
                "run_name": "1700000000-fuzzy-owl",
                "dataset_state": {"train": None, "eval": {}},
                "integrations": {},
                "metadata": {"torch_version": "2.7.0", "device": "gpu", "precision": "amp_fp16", "world_size": 1},
            },
            "rng": [rng()],
        }  # fmt: skip
        path = save(contents, folder / f"ep{epoch}-ba{batch}-rank0.pt", stream=stream)
        latest = folder / "latest-rank0.pt"
        latest.unlink(missing_ok=True)
        latest.symlink_to(path.name)
        key = "state.model"
        yield Saved(path, raw, average if ema else None, key, batch, epoch, learning_rate=0.0005)


@run_of(None)
def tutorial(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """The saving and loading tutorial of PyTorch."""
    for epoch in (4, 5, 10):
        contents = {
            "epoch": epoch,
            "model_state_dict": net(epoch).state_dict(),
            "optimizer_state_dict": adam(lr=0.01),
            "loss": 1 / epoch,
        }
        path = save(contents, folder / f"model_{epoch}.pt", stream=stream)
        yield Saved(path, state(epoch), None, "model_state_dict", None, epoch, {"loss": 1 / epoch}, learning_rate=0.01)


@run_of("Lightning", "last.ckpt")
def lightning(folder: Path, *, stream: bool = False, averaging: bool = False) -> Iterator[Saved]:
    """lightning/pytorch: ModelCheckpoint's names and state; the callback WeightAveraging swaps the weights."""
    scores = {8: 0.5, 9: 0.25, 10: 0.375}
    for epoch, score in scores.items():
        raw, average = state(epoch), state(50 + epoch)
        name = f"epoch={epoch}-step={100 * (epoch + 1)}.ckpt"
        monitor = {
            "monitor": "val_loss",
            "best_model_score": torch.tensor(min(scores[each] for each in scores if each <= epoch)),
            "best_model_path": "/old/machine/lightning_logs/version_0/checkpoints/epoch=9-step=1000.ckpt",
            "current_score": torch.tensor(score), "dirpath": "/old/machine/lightning_logs/version_0/checkpoints",
            "best_k_models": {f"/old/machine/epoch={each}-step={each}00.ckpt": torch.tensor(0.1) for each in scores},
            "kth_best_model_path": "", "kth_value": torch.tensor(0.1), "last_model_path": "",
        }  # fmt: skip
        callback = (
            "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1}"
        )
        progress = {"total": {"ready": 5, "completed": 5}, "current": {"ready": 5, "completed": 5}}
        contents: dict[str, Any] = {
            "epoch": epoch,
            "global_step": 100 * (epoch + 1),
            "pytorch-lightning_version": "2.6.0",
            "state_dict": ordered(average if averaging else raw),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": progress}, "validate_loop": {"state_dict": {}}},
            "callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"best_score": torch.tensor(0.1)}, callback: monitor},
            "optimizer_states": [adam(lr=0.002)],
            "lr_schedulers": [{"last_epoch": epoch, "_last_lr": [0.002]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1, "width": 3},
        }
        if averaging:
            contents["current_model_state"] = ordered(raw)
            contents["averaging_state"] = {"n_averaged": torch.tensor(3)}
        path = save(contents, folder / name, stream=stream)
        contents["callbacks"][callback] = {**monitor, "last_model_path": str(path)}
        save(contents, folder / "last.ckpt", stream=stream)
        key, ema = ("current_model_state", average) if averaging else ("state_dict", None)
        yield Saved(path, raw, ema, key, 100 * (epoch + 1), epoch, {"val_loss": score}, 0.002)


@run_of("timm", "last.pth.tar", "model_best.pth.tar")
def timm(folder: Path, *, stream: bool = False) -> Iterator[Saved]:
    """timm/utils/checkpoint_saver.py: ``last`` and ``model_best`` are hard links; with a table of results."""
    rows = ["epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"]
    for epoch, top1 in ((8, 70.5), (9, 72.5), (10, 71.5)):
        contents = {
            "epoch": epoch,
            "arch": "resnet50",
            "state_dict": net(epoch).state_dict(),
            "optimizer": adam(lr=0.05),
            "version": 2,
            "args": Namespace(model="resnet50", lr=0.05, epochs=300, resume=""),
            "amp_scaler": {"scale": 65536.0, "_growth_tracker": 3},
            "metric": top1,
            "state_dict_ema": net(50 + epoch).state_dict(),
        }
        path = save(contents, folder / f"checkpoint-{epoch}.pth.tar", stream=stream)
        for link in ["last.pth.tar"] + ["model_best.pth.tar"] * (epoch == 9):
            (folder / link).unlink(missing_ok=True)
            (folder / link).hardlink_to(path)
        rows.append(f"{epoch},1.5,{2.0 - top1 / 100},{top1},90.0,0.05")
        yield Saved(path, state(epoch), state(50 + epoch), "state_dict", None, epoch, {"metric": top1}, 0.05)
    (folder / "summary.csv").write_text("\n".join(rows) + "\n")


_MAKERS = [lightning, timm, torchvision, fairseq, espnet2, wenet, icefall, opennmt, ultralytics, mmengine, detectron2]
ONE_FILE: dict[str, Maker] = {make.__name__: make for make in (*_MAKERS, composer, tutorial)}
WITH_EMA: dict[str, Maker] = {make.__name__: make for make in (timm, torchvision, fairseq, icefall)} | {
    "lightning": partial(lightning, averaging=True),
    "mmengine": partial(mmengine, ema=True),
}


# --- folders per checkpoint --------------------------------------------------------------------------------


@run_of("DeepSpeed")
def deepspeed(folder: Path, *, stage: int = 2) -> Iterator[Saved]:
    """deepspeed/runtime/engine.py: 16-bit weights under ``module``, float32 masters flat among the optimizer states."""
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in Net().named_parameters())]
    for steps in (90, 100):
        tag = folder / f"global_step{steps}"
        tag.mkdir()
        weights = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state(steps).items()}
        contents = {
            "module": ordered(
                weights if stage < 3 else {name: torch.empty(0, dtype=torch.bfloat16) for name in weights}
            ),
            "buffer_names": ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"],
            "optimizer": None, "param_shapes": shapes, "frozen_param_shapes": None, "shared_params": {},
            "frozen_param_fragments": None, "lr_scheduler": {"last_batch_iteration": steps - 1},
            "data_sampler": None, "random_ltd": None, "sparse_tensor_module_names": set(), "skipped_steps": 0,
            "global_steps": steps, "global_samples": steps * 16, "dp_world_size": 2, "mp_world_size": 1,
            "ds_config": {"train_batch_size": 16, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}},
            "ds_version": "0.16.4",
        }  # fmt: skip
        optimizer = {
            "optimizer_state_dict": {
                "loss_scaler": None, "overflow": False, "base_optimizer_state": adam(), "zero_stage": stage,
                "single_partition_of_fp32_groups": [torch.rand(20)], "partition_count": [2], "ds_version": "0.16.4",
            },
            "ds_config": {"train_batch_size": 16}, "ds_version": "0.16.4",
        }  # fmt: skip
        for rank in range(2):
            if stage == 3:
                save(contents, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            name = f"{'bf16_' if stage < 3 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            save(optimizer, tag / name)
        if stage < 3:
            save(contents, tag / "mp_rank_00_model_states.pt")
        yield Saved(tag, weights, None, "module", steps)
    (folder / "latest").write_text("global_step100")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')\n")


@run_of("Megatron")
def megatron(folder: Path, ranks: tuple[str, ...] = ("mp_rank_00",), *, nested: bool = False) -> Iterator[Saved]:
    """megatron/training/checkpointing.py: a folder for each tensor or pipeline parallel rank."""
    for iteration in (90, 100):
        for rank in ranks:
            place = folder / f"iter_{iteration:07d}" / rank
            place.mkdir(parents=True)
            weights = state(iteration)
            model: object = OrderedDict(ordered(weights), **{"decoder.layers.0._extra_state": None})
            if nested:
                model = {"language_model": {"embedding": {"word_embeddings": {"weight": torch.rand(4, 2)}},
                                            "encoder": ordered(weights)}}  # fmt: skip
            contents = {
                "args": Namespace(tensor_model_parallel_size=len(ranks), pipeline_model_parallel_size=1, lr=0.0001),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "model": model,
                "optimizer": {"optimizer": adam(), "fp32_from_fp16_params": [[torch.rand(3)]]},
                "opt_param_scheduler": {"max_lr": 0.0001, "num_steps": iteration * 8},
                "rng_state": [rng()],
                "num_floating_point_operations_so_far": 1e15,
            }
            save(contents, place / "model_optim_rng.pt")
        yield Saved(folder / f"iter_{iteration:07d}", weights, None, "model", iteration)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def tokens(seed: int) -> dict[str, torch.Tensor]:
    """Weights of a small language model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed.weight": (6, 4), "model.layers.0.weight": (4, 4), "model.layers.1.weight": (4, 4)}
    return {
        name: torch.rand(shape, generator=generator) for name, shape in {**shapes, "lm_head.weight": (6, 4)}.items()
    }


def shard_names(stem: str, suffix: str, count: int) -> list[str]:
    """``model-00001-of-00002.safetensors`` and so on."""
    return [f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}" for number in range(count)]


def sharded(
    folder: Path, weights: State, *, stem: str = "model", suffix: str = "safetensors", count: int = 2
) -> dict[str, Any]:
    """Writes shards and their index, as transformers and diffusers do; returns the index."""
    files = shard_names(stem, suffix, count)
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for number, (name, tensor) in enumerate(weights.items()):
        parts[files[number % count]][name] = tensor
    for file, part in parts.items():
        if suffix == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            save(part, folder / file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    write_index(folder, index, stem=stem, suffix=suffix)
    return index


def write_index(folder: Path, index: object, *, stem: str = "model", suffix: str = "safetensors") -> Path:
    """Writes an index as it is."""
    path = folder / f"{stem}.{suffix}.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index, indent=2) + "\n")
    return path


@run_of("HF Trainer")
def hf_trainer(folder: Path, *, form: str = "model.safetensors") -> Iterator[Saved]:
    """transformers/trainer.py: a folder for each checkpoint, training state next to the weights."""
    losses = {500: 2.5, 1000: 1.75, 1500: 2.0}
    for step, loss in losses.items():
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        weights = tokens(step)
        if form == "model.safetensors":
            save_file(weights, place / form, metadata={"format": "pt"})
        elif form == "pytorch_model.bin":
            save(weights, place / form)
        else:
            sharded(place, weights, stem=form.split(".", maxsplit=1)[0], suffix=form.split(".")[1])
        save(adam(), place / "optimizer.pt")
        save({"last_epoch": step, "_last_lr": [0.0001]}, place / "scheduler.pt")
        save(rng(), place / "rng_state.pth")
        save(Namespace(output_dir="out"), place / "training_args.bin")
        (place / "config.json").write_text('{"model_type": "llama", "architectures": ["Model"]}')
        history: list[dict[str, float]] = []
        for logged in (at for at in losses if at <= step):
            history += [{"epoch": logged / 500, "learning_rate": 0.1 / logged, "loss": 3.0, "step": logged - 1}]
            history += [{"epoch": logged / 500, "eval_loss": losses[logged], "eval_runtime": 1.0, "step": logged}]
        trainer_state = {
            "best_global_step": min(step, 1000), "best_model_checkpoint": "/old/machine/out/checkpoint-1000",
            "best_metric": min(value for at, value in losses.items() if at <= step),
            "epoch": step / 500, "global_step": step, "log_history": history, "max_steps": 1500,
        }  # fmt: skip
        (place / "trainer_state.json").write_text(json.dumps(trainer_state, indent=2))
        metrics = {"eval_loss": loss}
        yield Saved(place, weights, None, None, step, step // 500, metrics)


@run_of("Accelerate")
def accelerate(folder: Path) -> Iterator[Saved]:
    """accelerate/checkpointing.py: <project>/checkpoints/checkpoint_<i>, numbered by saving, without a step."""
    for number in (0, 1, 10):
        place = folder / f"checkpoint_{number}"
        place.mkdir()
        save_file(tokens(number), place / "model.safetensors", metadata={"format": "pt"})
        save(adam(), place / "optimizer.bin")
        save({"last_epoch": number}, place / "scheduler.bin")
        save({"step": number}, place / "sampler.bin")
        (place / "random_states_0.pkl").write_bytes(pickle.dumps(rng()))
        yield Saved(place, tokens(number))


def peft(folder: Path) -> State:
    """peft/peft_model.py: the factors of a low-rank change, without the model that they change."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": torch.rand(2, 4), f"{layer}.lora_B.weight": torch.rand(4, 2)}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["q_proj"], "use_rslora": False})
    )
    return weights


# --- what is no checkpoint that could be averaged ------------------------------------------------------------


def torchscript(path: Path) -> Path:
    """A scripted module, code and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are around
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    return path


def nemo(path: Path) -> Path:
    """NeMo: a tar archive of a configuration and the weights."""
    weights = io.BytesIO()
    torch.save(ordered(state(1)), weights)
    with tarfile.open(path, "w:") as archive:
        for name, content in (("./model_config.yaml", b"target: x\n"), ("./model_weights.ckpt", weights.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def lfs_pointer(path: Path) -> Path:
    """What git leaves where git-lfs is not installed."""
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 437951328\n")
    return path


def html_page(path: Path) -> Path:
    """What a download that needs a login leaves."""
    path.write_text("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>\n")
    return path
