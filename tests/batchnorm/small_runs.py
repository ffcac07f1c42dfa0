"""Runs of a small model with BatchNorm, and statistics measured by hooks of the tests' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from recorded import Recorded
from torch import Tensor, nn

from ckpt_avg import average


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as reader:
        return reader.metadata()


def measure(model: nn.Module, batches: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle: count-weighted mean and unbiased variance by sums shifted by the first batch's mean."""
    sums: dict[str, list[Any]] = {}
    model.eval()
    hooks = []

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0].double().transpose(0, 1).flatten(1)
            if name not in sums:
                sums[name] = [values.mean(1), 0, 0.0, 0.0]
            shifted = values - sums[name][0].unsqueeze(1)
            sums[name][1] += values.shape[1]
            sums[name][2] += shifted.sum(1)
            sums[name][3] += shifted.square().sum(1)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.train()
            hooks.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    for handle in hooks:
        handle.remove()
    return {
        name: (shift + first / count, (second - first.square() / count) / (count - 1))
        for name, (shift, count, first, second) in sums.items()
    }


class Small(nn.Module):
    """Two BatchNorm layers between linear ones; `norm` makes each."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.first = norm(6)
        self.outer = nn.Linear(6, 3)
        self.second = norm(3)

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.outer(self.first(self.inner(values)).relu()))


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8 - number, 4, generator=generator) for number in range(count)]


def trained(make: Callable[[], nn.Module], count: int = 3) -> list[dict[str, Tensor]]:
    """State dicts of models with different weights, each after a few steps in train mode."""
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        model.train()
        with torch.no_grad():
            for batch in batches(2 + seed, seed=seed):
                model(batch)
        states.append(model.state_dict())
    return states


def save(states: list[dict[str, Tensor]], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number, state in enumerate(states):
        torch.save(state, folder / f"step_{number}.pt")
    return folder


def refuse(error: type[Exception], run: Path, *, overwrite: bool = False, **options: Any) -> str:
    """Averages, expects an error before any tensor is read, and that the output's folder is not changed."""
    recorded = Recorded()
    message = fail(error, run, overwrite=overwrite, progress=recorded.progress, **options)
    assert recorded.passes() == []
    return message


def fail(error: type[BaseException], run: Path, *, overwrite: bool = False, **options: Any) -> str:
    """Averages, expects an error, and that the output's folder is not changed."""
    output = run.parent / "out" / "swa.safetensors"
    output.parent.mkdir(exist_ok=True)
    before = b"the old one" if overwrite else None
    if before is not None:
        output.write_bytes(before)
    with pytest.raises(error) as caught:
        average([run], output, device="cpu", overwrite=overwrite, **options)
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == (
        {} if before is None else {output.name: before}
    )
    return str(caught.value)
