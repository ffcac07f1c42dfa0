"""What scripts without a trainer leave: state dicts of wrapped models, whole modules; zips and the older streams."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, copied, load_strictly, program, same
from nets import Net, batches, step
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

EPOCHS = 3


def contents(model: Net, average: AveragedModel, epoch: int, loss: float, rest: dict[str, Any]) -> dict[str, Any]:
    """Returns what the scripts would save, by name."""
    compiled = torch.compile(model)
    return {
        "bare": model.state_dict(),
        "tutorial": {"epoch": epoch, "model_state_dict": model.state_dict(), "loss": loss, **rest},
        "compiled": compiled.state_dict(),
        "parallel": {"model": torch.nn.DataParallel(model).state_dict(), "epoch": epoch},
        "compiled_parallel": torch.nn.DataParallel(compiled).state_dict(),
        "averaged": average.state_dict(),
        "module": model,
    }


def write(out: Path) -> None:
    warnings.filterwarnings("ignore")
    ledger = Ledger(out)
    torch.manual_seed(4)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for epoch, batch in enumerate(batches(EPOCHS), 1):
        loss = step(model, optimizer, batch)
        average.update_parameters(model)
        rest = {"optimizer_state_dict": optimizer.state_dict()}
        for name, saved in contents(model, average, epoch, loss, rest).items():
            for form in ("zip", "stream"):
                run = f"torch_{form}_{name}"
                path = (ledger.folder(run) if epoch == 1 else out / "runs" / run) / f"epoch_{epoch}.pt"
                torch.save(saved, path, _use_new_zipfile_serialization=form == "zip")
                state = copied((average.module if name == "averaged" else model).state_dict())
                again = torch.load(path, weights_only=False)
                if name == "module":
                    same(again.state_dict(), state)
                facts = {"step": None, "epoch": epoch, "metrics": {"loss": loss}} if name == "tutorial" else {}
                averaged = name == "averaged"
                kind = "torch AveragedModel" if averaged else None
                ledger.saved(run, path.name, state, kind=kind, averaged=averaged, **facts)
    ledger.close()


def load(run: str, weights: Path) -> None:
    load_strictly(Net(), weights)


if __name__ == "__main__":
    program(write, load)
