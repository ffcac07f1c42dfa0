"""What every producer leaves next to the checkpoints: what they really contain, and what the library recorded of them.

A producer is a program: ``write_x.py OUT`` trains and leaves run folders under ``OUT/runs``; ``write_x.py load RUN
WEIGHTS [RUN WEIGHTS]...`` loads averaged files into the models of runs, as their users would.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import ranks
import torch
from safetensors.torch import load_file

State = Mapping[str, torch.Tensor]


class Ledger:
    """Notes each checkpoint as it is saved."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._runs: dict[str, list[dict[str, Any]]] = {}

    def folder(self, run: str) -> Path:
        """Starts a run; returns its folder."""
        self._runs[run] = []
        folder = self.out / "runs" / run
        folder.mkdir(parents=True, exist_ok=True)  # several ranks make it
        return folder

    def saved(self, run: str, path: str, state: State, *, ema: State | None = None, **facts: Any) -> None:
        """Notes a checkpoint.

        Args:
            run: its run.
            path: where it is in the run folder.
            state: the weights that were saved, by the names of the model without any wrapper.
            ema: an exponential moving average next to them.
            facts: step, epoch, metrics, learning_rate, kind, …: what the library recorded of it.
        """
        number = len(self._runs[run])
        facts["path"] = path
        for name, tensors in (("truth", state), ("ema", ema)):
            if tensors is not None:
                facts[name] = f"truth/{run}.{number}.{name}.pt"
                (self.out / "truth").mkdir(exist_ok=True)
                # Tied tensors are written apart, so that the truth does not depend on how ties are read.
                torch.save(copied(tensors), self.out / facts[name])
        self._runs[run].append(facts)

    def close(self) -> None:
        """Writes the notes, next to those of other processes before this one."""
        path = self.out / "ledger.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(earlier | self._runs, indent=1))


def copied(state: State) -> dict[str, torch.Tensor]:
    """Returns copies of all tensors, row-major and each in a storage of its own."""
    return {name: torch.clone(value.detach(), memory_format=torch.contiguous_format) for name, value in state.items()}


def same(one: State, other: State) -> None:
    """Fails unless both hold the same names and bits: what a producer noted must be what its library loads."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def load_strictly(model: torch.nn.Module, weights: Path) -> None:
    """Loads an averaged file as `docs/output.md` says."""
    print(model.load_state_dict(load_file(weights), strict=True))


def program(write: Callable[[Path], None], load: Callable[[str, Path], None]) -> None:
    """Runs the producer that the command line asks for."""
    torch.set_num_threads(1)
    if sys.argv[1] == "load":
        for run, weights in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
            load(run, Path(weights))
    else:
        write(Path(sys.argv[1]))
        if ranks.started():
            ranks.leave()
