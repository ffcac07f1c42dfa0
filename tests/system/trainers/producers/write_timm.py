"""Runs of timm's training script: `CheckpointSaver` with its hard links, `ModelEmaV3` and `update_summary`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import no_torchvision  # noqa: F401 (before timm, which cannot be imported without it)
import timm
import torch
from ledger import Ledger, copied, load_strictly, program, same
from nets import step
from timm.utils import CheckpointSaver, ModelEmaV3, get_state_dict, unwrap_model, update_summary
from torch import nn

TOP1 = (40.0, 55.5, 70.25, 62.0, 50.0)  # neither rising nor falling; the last is too bad to be kept


def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3, in_chans=1)


def train(ledger: Ledger, run: str, *, history: int) -> None:
    torch.manual_seed(2)
    folder = ledger.folder(run)
    live = model()
    average = ModelEmaV3(live, decay=0.6)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9)
    arguments = Namespace(model="test_resnet", lr=0.1, opt="sgd", data_dir=Path("imagenet"), mean=(0.5,))
    saver = CheckpointSaver(
        live, optimizer, arguments, average, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=history
    )
    kept = []
    for epoch, top1 in enumerate(TOP1):
        rate = optimizer.param_groups[0]["lr"] = 0.1 / (epoch + 1)
        for batch in range(2):
            loss = step(live, optimizer, (torch.randn(4, 1, 32, 32), torch.randint(3, (4,))))
            average.update(live)
            if batch == 0 and epoch > 2:
                saver.save_recovery(epoch, batch_idx=batch)
        update_summary(epoch, {"loss": loss}, {"loss": loss / 2, "top1": top1}, folder / "summary.csv", lr=rate)
        saver.save_checkpoint(epoch, metric=top1)
        state, ema = copied(get_state_dict(live, unwrap_model)), copied(get_state_dict(average, unwrap_model))
        saved = torch.load(folder / "last.pth.tar", weights_only=False)
        same(saved["state_dict"], state)
        same(saved["state_dict_ema"], ema)
        kept.append((epoch, state, ema, rate, loss))
        if epoch == 1:
            saver.save_milestone(epoch + 1)
    for epoch, state, ema, rate, loss in kept:
        names = (f"checkpoint-{epoch}", f"milestone-{epoch + 1}")  # the second where the saver did not keep the first
        stored = [f"{name}.pth.tar" for name in names if (folder / f"{name}.pth.tar").exists()]
        if stored:
            metrics = {"metric": TOP1[epoch], "eval_top1": TOP1[epoch], "eval_loss": loss / 2}
            facts = {
                "step": None,
                "epoch": epoch,
                "metrics": metrics,
                "learning_rate": rate,
                "best": epoch == saver.best_epoch,
            }
            ledger.saved(run, stored[0], state, ema=ema, kind="timm", **facts)


def write(out: Path) -> None:
    ledger = Ledger(out)
    train(ledger, "timm", history=10)
    train(ledger, "timm_top", history=2)
    ledger.close()


def load(run: str, weights: Path) -> None:
    load_strictly(model(), weights)


if __name__ == "__main__":
    program(write, load)
