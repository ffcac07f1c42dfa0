"""Runs of Accelerate: `save_state` with names that count up, in safetensors, in pickles, and of FSDP shards."""

from __future__ import annotations

from pathlib import Path

import ranks
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, save_fsdp_model, set_seed
from ledger import Ledger, copied, load_strictly, program, same
from nets import Net, batches, step
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

SAVES = 3


def train(ledger: Ledger, run: str, *, safe: bool, two: bool = False) -> None:
    """Saves after every second step. ``two``: a second model next to the first, as in adversarial training."""
    set_seed(3)
    folder = ledger.folder(run)
    accelerator = Accelerator(
        cpu=True, project_config=ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True)
    )
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if two:
        accelerator.prepare(torch.nn.Linear(2, 2))
    for number, batch in enumerate(batches(2 * SAVES)):
        step(model, optimizer, batch)
        schedule.step()
        if number % 2:
            written = Path(accelerator.save_state(safe_serialization=safe))
            state = copied(accelerator.unwrap_model(model).state_dict())
            ledger.saved(run, str(written.relative_to(folder)), state, kind="Accelerate", number=number // 2)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            accelerator.load_state(str(written))
            same(copied(accelerator.unwrap_model(model).state_dict()), state)


def shards(ledger: Ledger) -> None:
    """One of two processes: FSDP shards, saved by `save_state`; rank 0 notes the gathered weights.

    Accelerate turns FSDP on only where it finds an accelerator. Here the model is sharded by FSDP itself, over the
    CPU, and Accelerate is told that it is; everything in the folder is written by its `save_state`.
    """
    run = "accelerate_fsdp"
    ranks.join()
    set_seed(3)
    folder = ledger.folder(run)
    project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    accelerator._models.append(model)
    accelerator.prepare_optimizer(optimizer)
    for number, batch in enumerate(batches(2 * SAVES)):
        step(model, optimizer, batch)
        if number % 2:
            written = Path(accelerator.save_state())
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if accelerator.is_main_process:
                ledger.saved(run, str(written.relative_to(folder)), state, kind="Accelerate", number=number // 2)
    # Each rank for itself: only those ranks can put these parts together again.
    alone = ledger.out / "refused" / "checkpoint_0"
    save_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, str(alone), use_dcp=False)
    if accelerator.is_main_process:
        ledger.close()


def write(out: Path) -> None:
    ledger = Ledger(out)
    if ranks.started():
        shards(ledger)
        return
    train(ledger, "accelerate", safe=True)
    train(ledger, "accelerate_bin", safe=False)
    train(ledger, "accelerate_two", safe=True, two=True)
    ledger.close()
    ranks.start(__file__, out)


def load(run: str, weights: Path) -> None:
    load_strictly(Net(), weights)


if __name__ == "__main__":
    program(write, load)
