"""A small model with BatchNorm, its data and a metric: as objects, and as a module of the user's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

InProcess = Callable[..., tuple[int, str, str]]
_numbers = itertools.count()

NET = """
import itertools, os, sys
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Linear(5, 2),
    )

def data(seed=100):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 6, generator=generator) for size in (6, 5, 4)]

def score(model):
    # Any change of a weight, a buffer or a mode changes these numbers.
    output = model(torch.cat(data(7))).double()
    return {"accuracy": (output[:, 0] > output[:, 1]).double().mean().item(), "loss": output.square().sum().item()}

def raises(model):
    raise LookupError("no test set")
"""


def objects(source: str) -> dict[str, Any]:
    """What a module with this source holds."""
    found: dict[str, Any] = {}
    exec(source, found)
    return found


def write_module(folder: Path, source: str) -> str:
    """Writes a module under a name that no other test has imported; returns the name."""
    name = f"trained_model_{os.getpid()}_{next(_numbers)}"
    (folder / f"{name}.py").write_text(source)
    return name


NET_OBJECTS = objects(NET)
make, data, score = (NET_OBJECTS[name] for name in ("make", "data", "score"))


def trained(seed: int, build: Callable[[], nn.Module] = make) -> dict[str, Tensor]:
    """Weights of the model, with running statistics that depend on the seed."""
    torch.manual_seed(seed)
    model = build().train()
    with torch.no_grad():
        for batch in data():
            model(batch * (2 + seed))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def of(tensors: dict[str, Tensor], function: Callable[[nn.Module], Any] = score) -> Any:
    """The oracle: the function, called by hand with a model that holds these weights."""
    model = make()
    model.load_state_dict(tensors)
    with torch.no_grad():
        return function(model.eval())


def of_file(path: Path, function: Callable[[nn.Module], Any] = score) -> Any:
    """The same of the weights in a file."""
    if path.suffix == ".safetensors":
        return of(load_file(path), function)
    state = torch.load(path)
    return of(state.get("model", state), function)


class App:
    """A module of the user's, in a folder whose name has spaces and a quote."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder / "my app's folder"
        self.folder.mkdir()
        self.module = write_module(self.folder, source)

    def options(self, function: str | None = None, *, data: bool = True) -> list[object]:
        """The options that name the model, the batches and the metric."""
        words: list[object] = ["--app-dir", self.folder, "--device", "cpu", "--model", f"{self.module}:make"]
        words += ["--data", f"{self.module}:data"] if data else ["--bn", "keep"]
        return words + (["--eval", f"{self.module}:{function}"] if function else [])


def names(folder: Path) -> list[str]:
    """The names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())
