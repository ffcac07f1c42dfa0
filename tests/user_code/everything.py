"""A model with everything that running it could disturb, and a snapshot of all that can be seen of it from outside."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Queue(nn.Module):
    """A momentum queue: its buffers move and are replaced, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(4.0))
        self.register_buffer("replaced", torch.arange(3))
        self.register_buffer("unset", None)
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        self.codes += values.detach().mean((0, 2, 3))
        self.replaced = self.replaced + 1
        self.hidden.add_(1)
        return values


class OwnForward(nn.BatchNorm2d):
    """A user's subclass, which runs in train mode while it is measured, with a buffer of its own."""

    def __init__(self, channels: int, **options: float | None) -> None:
        super().__init__(channels, **options)  # type: ignore[arg-type]
        self.register_buffer("steps", torch.tensor(5))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return super().forward(values)


class Everything(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old forms are deprecated, and still in use
            self.old_spectral = nn.utils.spectral_norm(nn.Conv2d(2, 4, 3))
            self.old_weight = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
        self.new_spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
        self.norm = nn.BatchNorm2d(4)
        self.own = OwnForward(4, momentum=None)
        self.narrow = OwnForward(4).to(torch.bfloat16)
        self.sync = nn.SyncBatchNorm(4, affine=False, momentum=0.3)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.queue = Queue()
        self.dropout = nn.Dropout(0.5)
        self.alias = self.norm
        self.volume = nn.BatchNorm3d(4)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.head.bias.requires_grad_(False)
        self.last = nn.BatchNorm1d(3)
        self.norm.register_forward_pre_hook(lambda module, arguments: None)
        self.norm.weight.register_hook(lambda gradient: gradient)
        self.own.register_forward_hook(lambda module, arguments, output: None, always_call=True)
        self.sync.register_forward_pre_hook(lambda module, arguments, keywords: None, with_kwargs=True)
        self.register_full_backward_hook(lambda module, given, returned: None)

    def train(self, mode: bool = True) -> Everything:
        raise AssertionError("train() or eval() of the user's model was called")

    def forward(self, values: Tensor) -> Tensor:
        values = self.new_spectral(self.old_weight(self.old_spectral(values)))
        values = self.alias(self.own(self.norm(values)))
        values = self.narrow(values.to(torch.bfloat16)).float()
        values = self.untracked(self.instance(self.sync(values)))
        values = self.dropout(self.queue(self.frozen(values)))
        values = self.volume(values.unsqueeze(2)).squeeze(2)
        return self.last(self.head(values.mean((2, 3))))


LAYERS = ("norm", "own", "narrow", "sync", "volume", "last")  # the frozen one aside
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
CHILDREN = (
    *("old_spectral", "old_weight", "new_spectral", "norm", "own", "narrow", "sync", "instance", "untracked"),
    *("frozen", "queue", "dropout", "volume", "head", "last"),
)
BATCHES = 3


def everything() -> Everything:
    torch.manual_seed(4)
    model = Everything()
    model.own.eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.dim() == 1 and buffer.is_floating_point():
                buffer.add_(0.25)
    return model


def batches() -> list[Tensor]:
    return list(randn(14, 2, 5, 5).split([5, 6, 3]))


def shuffled(at: int = -1, error: BaseException | None = None) -> Iterator[Tensor]:
    """Draws from all three sources of random numbers for each batch, and raises at one."""
    for number, batch in enumerate(batches(), start=1):
        random.random()
        np.random.rand()
        torch.rand(2)
        if number == at and error is not None:
            raise error
        yield batch


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return raw(torch.random.get_rng_state()), random.getstate(), kind, keys.tobytes(), *rest


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that can be seen of a model from outside, and the random states."""
    found: dict[str, object] = {"random states": random_states(), "state dict": list(model.state_dict())}
    for name, module in model.named_modules():
        found[f"{name} mode"] = module.training
        found[f"{name} class"] = type(module)
        found[f"{name} names"] = (sorted(vars(module)), list(module._buffers), list(module._parameters))
        for attribute, value in vars(module).items():
            if isinstance(value, (OrderedDict, dict)) and "hooks" in attribute:
                found[f"{name} {attribute}"] = list(value.items())
            elif isinstance(value, (int, float, str, bool, type(None), tuple)):
                found[f"{name} {attribute}"] = value
        for attribute, tensor in (*module._buffers.items(), *module._parameters.items()):
            found[f"{name} {attribute} itself"] = id(tensor)
            if tensor is not None:
                found[f"{name} {attribute} bytes"] = raw(tensor)
                flags = (tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.grad, tensor.grad_fn)
                found[f"{name} {attribute} flags"] = flags
                found[f"{name} {attribute} hooks"] = list((tensor._backward_hooks or {}).items())
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key, "none") != after.get(key, "none")}
