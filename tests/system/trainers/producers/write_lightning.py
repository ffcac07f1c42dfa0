"""Runs of Lightning: its default names, names with a metric, the `WeightAveraging` callback, sharded folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as pl
import ranks
import torch
from ledger import Ledger, copied, load_strictly, program, same
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from nets import CLASSES, Net, batches
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

EPOCHS, BATCHES = 6, 3


class Classifier(pl.LightningModule):
    """A model with a schedule that restarts every second epoch, and a validation loss.

    A checkpoint holds the learning rate of the next step, whether the schedule goes by steps or by epochs.
    """

    def __init__(self, interval: str = "step", *, noisy: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()
        self.register_buffer("weights", torch.ones(CLASSES))
        self.rates: list[float] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        images, labels = batch
        loss = cross_entropy(self(images), labels, self.weights)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        interval = self.hparams["interval"]
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, 2 if interval == "epoch" else 2 * BATCHES
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}


class Note(ModelCheckpoint):
    """The library's own callback, which also keeps what it saves."""

    def __init__(self, folder: Path, average: EMAWeightAveraging | None = None, **options: Any) -> None:
        super().__init__(folder, **options)
        self.average = average
        self.kept: dict[str, dict[str, Any]] = {}

    @property
    def state_key(self) -> str:  # of the class that this stands for
        return super().state_key.replace("Note", "ModelCheckpoint")

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        state, ema = copied(trainer.lightning_module.state_dict()), None
        if self.average is not None:
            assert self.average._average_model is not None
            ema = copied(self.average._average_model.module.state_dict())
        saved = torch.load(filepath, weights_only=True)
        same(saved["current_model_state" if ema else "state_dict"], state)
        if ema:
            same(saved["state_dict"], ema)
        self.kept[Path(filepath).name] = {
            "state": state,
            "ema": ema,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "metrics": {"val_loss": float(trainer.callback_metrics["val_loss"])},  # what is monitored, and no more
            "learning_rate": trainer.lightning_module.rates[-1],
        }

    def note(self, ledger: Ledger, run: str) -> None:
        """Notes what was not deleted again; the last one by its other name, unless it has no other."""
        steps = set()
        for name, facts in sorted(self.kept.items(), key=lambda item: (item[0].startswith("last"), item[1]["step"])):
            if Path(self.dirpath, name).exists() and facts["step"] not in steps:
                steps.add(facts["step"])
                ledger.saved(run, name, kind="Lightning", **facts)


def train(ledger: Ledger, run: str, *more: EMAWeightAveraging, interval: str = "step", **options: Any) -> None:
    pl.seed_everything(5)
    folder = ledger.folder(run)
    checkpoints = Note(folder, *more, monitor="val_loss", **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[checkpoints, *more],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        Classifier(interval),
        DataLoader(batches(BATCHES), batch_size=None),
        DataLoader(batches(2, seed=1), batch_size=None),
    )
    checkpoints.note(ledger, run)
    for path in folder.glob("*.ckpt"):
        again = Classifier.load_from_checkpoint(path)
        same(copied(again.state_dict()), torch.load(path, weights_only=True)["state_dict"])


def shards(ledger: Ledger) -> None:
    """One of two processes: the sharded folders of both strategies.

    The strategies train on a GPU only. Here FSDP itself shards the model over the CPU, and the folder is written by the
    strategies' own `save_checkpoint`, from the checkpoint that a Trainer's connector would hand to it.
    """
    rank = ranks.join()
    pl.seed_everything(5)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for run, strategy in (
        ("lightning_fsdp", FSDPStrategy(state_dict_type="sharded")),
        ("lightning_model_parallel", ModelParallelStrategy(save_distributed_checkpoint=True)),
    ):
        folder = ledger.folder(run)
        strategy.broadcast = lambda value, src=0: value  # what the process group of a running Trainer does
        model = fully_shard(Classifier(), mesh=mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for epoch, (images, labels) in enumerate(batches(3)):
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            checkpoint = {
                "epoch": epoch,
                "global_step": 10 * (epoch + 1),
                "pytorch-lightning_version": pl.__version__,
                "state_dict": get_model_state_dict(model),
                "loops": {"fit_loop": {"state_dict": {}}},
                "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"monitor": "val_loss"}},
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [],
            }
            path = folder / f"epoch={epoch}-step={10 * (epoch + 1)}.ckpt"
            strategy.save_checkpoint(checkpoint, path)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                ledger.saved(run, path.name, state, kind="Lightning", step=10 * (epoch + 1), epoch=epoch)
    if rank == 0:
        ledger.close()


def write(out: Path) -> None:
    ledger = Ledger(out)
    if ranks.started():
        shards(ledger)
        return
    train(ledger, "lightning", save_top_k=-1, save_last=True)
    train(
        ledger, "lightning_metric", save_top_k=-1, save_last="link", filename="{epoch}-{val_loss:.3f}", interval="epoch"
    )
    train(ledger, "lightning_top", save_top_k=2, save_last=True)
    train(ledger, "lightning_average", EMAWeightAveraging(decay=0.7), save_top_k=-1, save_last=True)
    ledger.close()
    ranks.start(__file__, out)
    for run in ("lightning_fsdp", "lightning_model_parallel"):
        for path in (out / "runs" / run).iterdir():
            _load_distributed_checkpoint(path)  # what `lightning consolidate` does


def load(run: str, weights: Path) -> None:
    load_strictly(Classifier(), weights)


if __name__ == "__main__":
    program(write, load)
