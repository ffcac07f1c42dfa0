"""Folders of torch.distributed.checkpoint: one process and two, its own layout and its safetensors layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed.checkpoint as dcp
from ledger import Ledger, State, copied, load_strictly, program, same
from nets import Net, batches, step
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

SAVES = 3


# How its tensors are laid out over two ranks; what is not named is a plain tensor on every rank.
PLACEMENTS = {
    "columns": Shard(1),
    "uneven": Shard(0),
    "one_row": Shard(0),
    "inner": Shard(1),
    "everywhere": Replicate(),
    "scale": Replicate(),
}


class Wide(nn.Module):
    """What tensor parallelism shards: by columns, unevenly, with nothing on one rank, not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(5, 9, dtype=torch.bfloat16))
        self.uneven = nn.Parameter(torch.randn(7, 3))
        self.one_row = nn.Parameter(torch.randn(1, 4))
        self.inner = nn.Parameter(torch.randn(2, 6, 3).half())
        self.everywhere = nn.Parameter(torch.randn(4).double())
        self.scale = nn.Parameter(torch.randn(()))
        self.plain = nn.Parameter(torch.randn(3, 3).t())
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False, True]))


class Trained:
    """A model with its optimizer; each call takes a step and returns what one saves."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.batches = iter(batches(20))

    def __call__(self) -> dict[str, Any]:
        step(self.model, self.optimizer, next(self.batches))
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "progress": {"step": 1, "seen": torch.tensor(8)}}


def full(model: nn.Module) -> State:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def loads(path: Path, state: State, prefix: str = "", reader: dcp.StorageReader | None = None) -> None:
    """What was noted is what `dcp.load` gives one process."""
    target = {prefix + name: torch.zeros_like(value) for name, value in copied(state).items()}
    dcp.load(target, checkpoint_id=path, storage_reader=reader, no_dist=True)
    same({name.removeprefix(prefix): value for name, value in target.items()}, copied(state))


def one_process(ledger: Ledger) -> None:
    writers: dict[str, Callable[[Path], dcp.StorageWriter]] = {
        "dcp_flat": dcp.FileSystemWriter,
        "dcp_nested": lambda path: dcp.FileSystemWriter(path, single_file_per_rank=False, thread_count=2),
        "dcp_safetensors": lambda path: dcp.HuggingFaceStorageWriter(str(path), save_distributed=True),
        "dcp_safetensors_index": lambda path: dcp.HuggingFaceStorageWriter(str(path), halves()),
    }
    for run, writer in writers.items():
        folder, trained = ledger.folder(run), Trained()
        for number in range(1, SAVES + 1):
            state, path = trained(), folder / f"step-{number}"
            nested = run == "dcp_nested"
            dcp.save(state if nested else state["model"], storage_writer=writer(path), no_dist=True)
            reader = None if "safetensors" not in run else dcp.HuggingFaceStorageReader(str(path))
            loads(path, state["model"], "model." if nested else "", reader)
            kind = {} if "index" in run else {"kind": "torch DCP"}  # those are shards like any other's
            ledger.saved(run, path.name, state["model"], step=number, **kind)


def halves() -> dict[str, int]:
    """Maps names to two files, as a user of a large model does."""
    return {name: 1 + number % 2 for number, name in enumerate(Net().state_dict())}


def dense() -> nn.Module:
    """A model without integers: torch 2.13 cannot consolidate those (it asks `torch.finfo` for their size)."""
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5))


def folder_of(ledger: Ledger, run: str, number: int) -> Path:
    return (ledger.folder(run) if number == 1 else ledger.out / "runs" / run) / f"step-{number}"


def two_processes(ledger: Ledger) -> None:
    rank = ranks.join()
    mesh = init_device_mesh("cpu", (2,))

    def save(run: str, number: int, state: dict[str, Any], truth: State, writer: dcp.StorageWriter | None) -> None:
        path = folder_of(ledger, run, number)
        dcp.save(state, checkpoint_id=path if writer is None else None, storage_writer=writer)
        if rank == 0:
            ledger.saved(run, path.name, truth, step=number, **({} if "consolidated" in run else {"kind": "torch DCP"}))

    for number in range(1, SAVES + 1):
        torch.manual_seed(number)
        model = Wide()
        model.norm.num_batches_tracked.fill_(number)
        state = {
            name: distribute_tensor(value.detach(), mesh, [PLACEMENTS[name]]) if name in PLACEMENTS else value
            for name, value in model.state_dict().items()
        }
        save("dcp_wide", number, {"model": state}, model.state_dict(), None)

    trained = Trained()
    fully_shard(trained.model.hidden, mesh=mesh)
    fully_shard(trained.model, mesh=mesh)
    trained.optimizer = torch.optim.AdamW(trained.model.parameters(), lr=0.02)
    for number in range(1, SAVES + 1):
        state = trained()
        truth = full(trained.model)
        save("dcp_fsdp", number, state, truth, None)
        writer = dcp.HuggingFaceStorageWriter(
            str(folder_of(ledger, "dcp_safetensors_two", number)), save_distributed=True
        )
        save("dcp_safetensors_two", number, state["model"], truth, writer)

    torch.manual_seed(1)
    layers = fully_shard(dense(), mesh=mesh)
    for number in range(1, SAVES + 1):
        for parameter in layers.parameters():
            nn.init.normal_(parameter)
        writer = dcp.HuggingFaceStorageWriter(
            str(folder_of(ledger, "dcp_safetensors_consolidated", number)),
            {name: 1 + number % 2 for number, name in enumerate(dense().state_dict())},
            save_distributed=True,
            enable_consolidation=True,
        )
        save("dcp_safetensors_consolidated", number, get_model_state_dict(layers), full(layers), writer)
    if rank == 0:
        ledger.close()


def write(out: Path) -> None:
    ledger = Ledger(out)
    if ranks.started():
        two_processes(ledger)
        return
    one_process(ledger)
    ledger.close()
    ranks.start(__file__, out)
    for run, prefix in (("dcp_wide", "model."), ("dcp_fsdp", "model."), ("dcp_safetensors_two", "")):
        for number in range(1, SAVES + 1):
            path = out / "runs" / run / f"step-{number}"
            reader = dcp.HuggingFaceStorageReader(str(path)) if "safetensors" in run else None
            loads(path, torch.load(out / "truth" / f"{run}.{number - 1}.truth.pt"), prefix, reader)


def load(run: str, weights: Path) -> None:
    load_strictly({"dcp_wide": Wide, "dcp_safetensors_consolidated": dense}.get(run, Net)(), weights)


if __name__ == "__main__":
    program(write, load)
