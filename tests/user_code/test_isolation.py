"""Whatever is raised, wherever, during a refresh: the model and all random states are as before."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ckpt_avg import UserCodeError, refresh_batch_norm
from ckpt_avg.user_code.isolation import undisturbed


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# A model of everything that could be disturbed


class Queue(nn.Module):
    """A momentum queue: its buffers move, are replaced, appear and go, in evaluation mode too."""

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
    """Runs in train mode while it is measured."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values)


class Everything(nn.Module):
    """One of each kind of layer; ``calls`` counts the modules that were entered, and one of them may raise."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old forms are deprecated, and around
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
        self.head = nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)
        self.last = nn.BatchNorm1d(3)
        self.norm.register_forward_pre_hook(lambda module, arguments: None)
        self.own.register_forward_hook(lambda module, arguments, output: None, always_call=True)

    def forward(self, values: Tensor) -> Tensor:
        values = self.new_spectral(self.old_weight(self.old_spectral(values)))
        values = self.alias(self.own(self.norm(values)))
        values = self.narrow(values.to(torch.bfloat16)).float()
        values = self.untracked(self.instance(self.sync(values)))
        values = self.dropout(self.queue(self.frozen(values)))
        values = self.volume(values.unsqueeze(2)).squeeze(2)
        return self.last(self.head(values.mean((2, 3))))


LAYERS = ("norm", "own", "narrow", "sync", "volume", "last")
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


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return raw(torch.random.get_rng_state()), random.getstate(), kind, keys.tobytes(), *rest


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that can be told of a model from outside, and the random states."""
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
    return found


def moved(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key, "none") != after.get(key, "none")}


def shuffled(at: int = -1, error: BaseException | None = None) -> Iterator[Tensor]:
    """Draws from all three sources of random numbers for each batch, and raises at one."""
    for number, batch in enumerate(batches(), start=1):
        random.random()
        np.random.rand()
        torch.rand(2)
        if number == at and error is not None:
            raise error
        yield batch


@pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
def test_the_statistics_of_the_layers_are_all_that_moves(estimator: str) -> None:
    model = everything()
    before = snapshot(model)
    refresh_batch_norm(model, shuffled(), frozen=["frozen"], estimator=estimator)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert moved(before, snapshot(model)) == {f"{layer} {buffer} bytes" for layer in LAYERS for buffer in buffers}


ERRORS = [
    OSError("no route"),
    StopIteration("early"),
    SystemExit(3),
    KeyboardInterrupt(),
    MemoryError(),
    GeneratorExit(),
    RuntimeError("CUDA error: device-side assert"),
]


def expected(error: BaseException) -> type[BaseException]:
    if isinstance(error, (Exception, SystemExit)) and not isinstance(error, MemoryError):
        return UserCodeError
    return type(error)


@pytest.mark.guarantee("refresh-fails")
@pytest.mark.parametrize("at", range(1, BATCHES + 1))
@pytest.mark.parametrize(
    "error",
    [error for error in ERRORS if not isinstance(error, StopIteration)],  # which is the end of a loader
    ids=lambda error: type(error).__name__,
)
def test_a_loader_that_raises_at_any_batch_moves_nothing(error: BaseException, at: int) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return self

        def __init__(self) -> None:
            self.batches = iter(batches())
            self.number = 0

        def __next__(self) -> Tensor:
            self.number += 1
            random.random(), np.random.rand(), torch.rand(2)
            if self.number == at:
                raise error
            return next(self.batches)

    model = everything()
    before = snapshot(model)
    with pytest.raises(expected(error)):
        refresh_batch_norm(model, Loader(), frozen=["frozen"])
    assert moved(before, snapshot(model)) == set()


class At:
    """A hook that raises when its module is entered the n-th time, and draws random numbers before."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.left, self.error = number, error

    def __call__(self, *_: object) -> None:
        random.random(), np.random.rand(), torch.rand(2)
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("at", range(1, BATCHES + 1))
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("child", CHILDREN)
def test_a_model_that_raises_at_any_layer_of_any_batch_moves_nothing(child: str, place: str, at: int) -> None:
    """Before a layer has been measured, and when it has been."""
    model = everything()
    module = model.get_submodule(child)
    register = module.register_forward_pre_hook if place == "before" else module.register_forward_hook
    error = ERRORS[(CHILDREN.index(child) + at) % len(ERRORS)]
    register(At(at, error))
    before = snapshot(model)
    with pytest.raises(expected(error)):
        refresh_batch_norm(model, batches(), frozen=["frozen"])
    assert moved(before, snapshot(model)) == set()


@pytest.mark.parametrize("at", range(1, BATCHES + 1))
@pytest.mark.parametrize("layer", LAYERS)
def test_activations_that_are_nan_at_any_layer_move_nothing(layer: str, at: int) -> None:
    model = everything()
    calls = itertools.count(1)
    model.get_submodule(layer).register_forward_pre_hook(
        lambda _, arguments: (arguments[0] * (float("nan") if next(calls) == at else 1),)
    )
    before = snapshot(model)
    with pytest.raises(UserCodeError, match=f"layer '{layer}', batch .*expected finite activations"):
        refresh_batch_norm(model, batches(), frozen=["frozen"])
    assert moved(before, snapshot(model)) == set()


@pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
def test_statistics_that_the_last_layer_cannot_hold_move_nothing(estimator: str) -> None:
    """When all batches are through and the others' are ready to be stored."""
    model = everything()
    model.last.running_var = model.last.running_var.half()
    model.last.running_mean = model.last.running_mean.half()
    model.last.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1e5,))
    model.last.forward = lambda values: values
    before = snapshot(model)
    with pytest.raises(UserCodeError, match="layer 'last': expected a running_var within the range"):
        refresh_batch_norm(model, batches(), frozen=["frozen"], estimator=estimator)
    assert moved(before, snapshot(model)) == set()


# ---------------------------------------------------------------------------------------------------------------------
# Buffers that appear and go


class Appearing(nn.Module):
    """Makes buffers on its first call, as caches of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, values: Tensor) -> Tensor:
        return values


def sets_an_empty_one(module: Any) -> None:
    module.cache = torch.zeros(3)


def registers_another(module: Any) -> None:
    module.register_buffer("further", torch.zeros(3))


def deletes_one(module: Any) -> None:
    del module.scale


def empties_one(module: Any) -> None:
    module.scale = None


def makes_one_a_parameter(module: Any) -> None:
    del module.scale
    module.scale = nn.Parameter(torch.zeros(3))


def resizes_one(module: Any) -> None:
    module.scale.data = torch.full((5,), 2.0)


def gives_one_other_memory(module: Any) -> None:
    module.scale.data = torch.zeros(3)


@pytest.mark.parametrize("fails", [False, True], ids=["in the end", "on an error"])
@pytest.mark.parametrize(
    "change",
    [
        sets_an_empty_one,
        registers_another,
        deletes_one,
        empties_one,
        makes_one_a_parameter,
        resizes_one,
        gives_one_other_memory,
    ],
    ids=lambda change: change.__name__,
)
def test_buffers_that_a_forward_makes_or_drops_are_as_before(change: Callable[[Any], None], fails: bool) -> None:
    """The state dict would have other names afterwards."""
    appearing = Appearing()
    changed = False

    def once(module: nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal changed
        if not changed:
            changed = True
            change(module)

    appearing.register_forward_pre_hook(once)
    model = nn.Sequential(appearing, nn.BatchNorm1d(3))
    before = snapshot(model)
    rows = [randn(4, 3), *([randn(1, 3)] if fails else [])]
    try:
        refresh_batch_norm(model, rows)
    except UserCodeError:
        assert fails
    allowed = () if fails else ("running_mean bytes", "running_var bytes", "num_batches_tracked bytes")
    assert {key for key in moved(before, snapshot(model)) if not key.endswith(allowed or "\0")} == set()


def test_buffers_outside_of_inference_mode_stay_as_they_are() -> None:
    """Tensors made under `torch.inference_mode()` cannot be written to outside of it."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = snapshot(model)
    with pytest.raises(UserCodeError, match="inference"):
        refresh_batch_norm(model, [randn(5, 3)])
    assert moved(before, snapshot(model)) == set()


def test_batches_made_in_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        rows = [randn(5, 3), randn(4, 3, seed=1)]
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert refresh_batch_norm(model, rows).samples == 9
    with torch.inference_mode():
        assert refresh_batch_norm(model, rows).samples == 9
    assert not model[1].running_mean.is_inference()


def test_parameters_keep_their_gradients_and_what_they_require() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    model(randn(5, 3)).square().sum().backward()
    before = {name: (tensor.requires_grad, tensor.grad) for name, tensor in model.named_parameters()}
    gradients = {name: each.clone() for name, (_, each) in before.items() if each is not None}
    refresh_batch_norm(model, [randn(5, 3)])
    for name, tensor in model.named_parameters():
        assert (tensor.requires_grad, tensor.grad) == before[name]
        assert name not in gradients or torch.equal(tensor.grad, gradients[name])
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# Random states


@pytest.mark.guarantee("refresh-only")
@pytest.mark.parametrize("at", [None, 1, 2, 3])
def test_all_three_random_states_are_as_before(at: int | None) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random_states()
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(50))
    if at is None:
        refresh_batch_norm(model, shuffled())
    else:
        with pytest.raises(UserCodeError):
            refresh_batch_norm(model, shuffled(at, OSError()))
    assert random_states() == before
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_a_shuffling_loader_shuffles_alike_every_time() -> None:
    """The states are put back, so a second refresh sees the same order: its batches are the same."""
    loader = DataLoader(TensorDataset(randn(20, 3)), batch_size=6, shuffle=True)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    first, second = (refresh_batch_norm(model, loader).statistics["2"] for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.variance, second.variance)


# ---------------------------------------------------------------------------------------------------------------------
# The context itself


def test_the_users_own_train_and_eval_are_not_called() -> None:
    class Stubborn(nn.Module):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError

    model = nn.Sequential(Stubborn(), nn.Dropout())
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_modes_that_differ_inside_a_model_are_kept_apart() -> None:
    model = nn.Sequential(nn.Dropout().eval(), nn.Sequential(nn.Dropout(), nn.Dropout().eval()))
    before = [module.training for module in model.modules()]
    with undisturbed(model):
        nn.Module.train(model)
    assert [module.training for module in model.modules()] == before == [True, False, True, True, False]


def test_what_is_raised_passes_through() -> None:
    error = KeyError("theirs")
    with pytest.raises(KeyError) as caught, undisturbed(nn.Dropout()):
        raise error
    assert caught.value is error


# ---------------------------------------------------------------------------------------------------------------------
# A worker process that dies


class Mortal(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if index == 7:
            time.sleep(0.2)  # what was queued before is delivered, so no lock dies with the process
            os.kill(os.getpid(), signal.SIGKILL)
        return randn(3, seed=index)


def test_the_only_worker_of_a_loader_dies() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = snapshot(model)
    loader = DataLoader(Mortal(), batch_size=2, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UserCodeError, match="the dataloader raised at batch"):
        refresh_batch_norm(model, loader)
    assert moved(before, snapshot(model)) == set()
