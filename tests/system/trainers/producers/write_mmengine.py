"""Runs of mmengine's Runner: `CheckpointHook` by epochs with the best, by iterations, and with `EMAHook`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, copied, load_strictly, program, same
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from nets import Net, batches
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 4


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> Any:
        logits = self.net(images)
        return {"loss": cross_entropy(logits, labels)} if mode == "loss" else [(logits, labels)]


class Accuracy(BaseMetric):
    default_prefix = "test"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [(logits.argmax(1) == labels).float().mean().item() for logits, labels in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"accuracy": sum(results) / len(results)}


class Note(Hook):
    """Keeps the weights of every checkpoint, of the average next to them, and the learning rate of the last step."""

    priority = "VERY_HIGH"  # before other hooks change what is saved

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]] = {}
        self.rates: dict[int, float] = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.rates[runner.iter + 1] = runner.optim_wrapper.optimizer.param_groups[0]["lr"]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        averages = [copied(hook.ema_model.module.state_dict()) for hook in runner.hooks if hasattr(hook, "ema_model")]
        when = checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"]
        self.states[when] = (copied(runner.model.state_dict()), averages[0] if averages else None)


def train(ledger: Ledger, run: str, *, by_epoch: bool, average: bool = False) -> None:
    folder = ledger.folder(run)
    note = Note()
    data = [
        TensorDataset(*(torch.cat(column) for column in zip(*batches(3, seed=seed), strict=True))) for seed in (0, 1)
    ]
    loaders = [DataLoader(dataset, batch_size=8) for dataset in data]
    hook = {"type": "CheckpointHook", "interval": 1 if by_epoch else 3, "by_epoch": by_epoch}
    runner = Runner(
        model=Classifier(),
        work_dir=str(folder),
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        val_evaluator=Evaluator([Accuracy()]),
        train_cfg={"by_epoch": True, "max_epochs": EPOCHS, "val_interval": 1}
        if by_epoch
        else {"by_epoch": False, "max_iters": 9, "val_interval": 3},
        val_cfg={},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        param_scheduler={"type": "MultiStepLR", "milestones": [2], "by_epoch": by_epoch},
        default_hooks={"checkpoint": hook | ({"save_best": "test/accuracy", "rule": "greater"} if by_epoch else {})},
        custom_hooks=[note, *([{"type": "EMAHook", "momentum": 0.4}] if average else [])],
        randomness={"seed": 1},
        experiment_name=run,
        log_level="ERROR",
    )
    runner.train()
    (scalars,) = folder.glob("*/vis_data/scalars.json")
    validated = {
        entry["step"]: {"test/accuracy": entry["test/accuracy"]}
        for entry in map(json.loads, scalars.read_text().splitlines())
        if "test/accuracy" in entry
    }
    for (epoch, step), (state, ema) in sorted(note.states.items()):
        number = epoch if by_epoch else step
        path = f"epoch_{number}.pth" if by_epoch else f"iter_{number}.pth"
        saved = torch.load(folder / path, weights_only=False)
        if ema is not None:  # the hook swaps them: the file's `state_dict` is the average
            same(saved["state_dict"], ema)
            raw = {name.removeprefix("module."): value for name, value in saved["ema_state_dict"].items()}
            raw.pop("steps")
            same(raw, state)
        else:
            same(saved["state_dict"], state)
        ledger.saved(
            run,
            path,
            state,
            ema=ema,
            kind="mmengine",
            step=step,
            epoch=epoch,
            learning_rate=note.rates[step],
            validated=validated.get(number, {}),
        )


def write(out: Path) -> None:
    ledger = Ledger(out)
    train(ledger, "mmengine", by_epoch=True)
    train(ledger, "mmengine_iter", by_epoch=False)
    train(ledger, "mmengine_average", by_epoch=True, average=True)
    ledger.close()


def load(run: str, weights: Path) -> None:
    load_strictly(Classifier(), weights)


if __name__ == "__main__":
    program(write, load)
