"""Whatever is raised, wherever, during a refresh: the model and all random states are as before."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from user_code.everything import (
    BATCHES,
    CHILDREN,
    LAYERS,
    STATISTICS,
    batches,
    changed,
    everything,
    randn,
    random_states,
    shuffled,
    snapshot,
)

from ckpt_avg import UserCodeError, refresh_batch_norm
from ckpt_avg.user_code.isolation import undisturbed


@pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
def test_the_statistics_of_the_layers_are_all_that_moves(estimator: str) -> None:
    model = everything()
    before = snapshot(model)
    report = refresh_batch_norm(model, shuffled(), frozen=["frozen"], estimator=estimator)
    assert changed(before, snapshot(model)) == {f"{layer} {buffer} bytes" for layer in LAYERS for buffer in STATISTICS}
    assert set(report.statistics) == set(LAYERS)
    assert (report.frozen, report.untracked, report.used_twice) == (("frozen",), ("untracked",), ("norm",))
    for layer in LAYERS:  # and they are those that were measured
        module, measured = model.get_submodule(layer), report.statistics[layer]
        assert torch.equal(module.running_mean, measured.mean.to(module.running_mean.dtype))
        assert torch.equal(module.running_var, measured.variance.to(module.running_var.dtype))
        assert module.num_batches_tracked.item() == measured.batches_tracked


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


def error_that_moves_nothing(
    model: nn.Module,
    rows: Iterable[Any],
    kind: type[BaseException] = UserCodeError,
    match: str | None = None,
    **options: Any,
) -> BaseException:
    """Asserts that a refresh ends with an error and leaves the model and all random states as before; returns it."""
    before = snapshot(model)
    with pytest.raises(kind, match=match) as caught:
        refresh_batch_norm(model, rows, **{"frozen": ["frozen"], **options})
    assert changed(before, snapshot(model)) == set()
    return caught.value


@pytest.mark.guarantee("refresh-fails")
@pytest.mark.parametrize("at", range(1, BATCHES + 1))
@pytest.mark.parametrize(
    "error",
    [error for error in ERRORS if not isinstance(error, StopIteration)],  # which is the end of a loader
    ids=lambda error: type(error).__name__,
)
def test_a_loader_that_raises_at_any_batch_moves_nothing(error: BaseException, at: int) -> None:
    found = error_that_moves_nothing(everything(), shuffled(at, error), expected(error))
    if isinstance(found, UserCodeError):
        assert f"the dataloader raised at batch {at}: {type(error).__name__}: {error}" in str(found)
        assert found.__cause__ is error


class At:
    """A hook that raises when its module is entered the n-th time, and draws random numbers before."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.left, self.error = number, error

    def __call__(self, *_: object) -> None:
        random.random(), np.random.rand(), torch.rand(2)
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("at", [1, BATCHES])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("child", CHILDREN)
def test_a_model_that_raises_at_any_layer_of_any_batch_moves_nothing(child: str, when: str, at: int) -> None:
    """Before a layer has been measured, and when it has been."""
    model = everything()
    module = model.get_submodule(child)
    register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    error = ERRORS[(CHILDREN.index(child) + at) % len(ERRORS)]
    register(At(at, error))
    found = error_that_moves_nothing(model, batches(), expected(error))
    if isinstance(found, UserCodeError):
        # A layer that is used twice raises at its second call, in the first batch.
        assert re.search(rf"the model raised at batch [{-(-at // 2)}{at}] \(a tensor of shape", str(found))


@pytest.mark.parametrize("at", range(1, BATCHES + 1))
@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (randn(1, 2, 5, 5), "layer 'last', batch {}: expected more than one value per channel"),
        ("a string", "batch {}: got a str"),
    ],
    ids=["one value", "another kind"],
)
def test_a_batch_that_cannot_be_measured_moves_nothing(batch: object, says: str, at: int) -> None:
    """The last layer gets one value per channel when all others have been measured."""
    error_that_moves_nothing(everything(), [*batches()[: at - 1], batch], match=says.format(at))


def test_a_progress_callback_that_raises_moves_nothing() -> None:
    def progress(batches: int, samples: int) -> None:
        raise BrokenPipeError

    error_that_moves_nothing(everything(), batches(), BrokenPipeError, progress=progress)


@pytest.mark.parametrize("at", range(1, BATCHES + 1))
@pytest.mark.parametrize("layer", LAYERS)
def test_activations_that_are_nan_at_any_layer_move_nothing(layer: str, at: int) -> None:
    model = everything()
    calls = itertools.count(1)
    model.get_submodule(layer).register_forward_pre_hook(
        lambda _, arguments: (arguments[0] * (float("nan") if next(calls) == at else 1),)
    )
    message = f"layer '{layer}', batch .*the activations contain NaN or Inf"
    error_that_moves_nothing(model, batches(), match=message)


@pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
def test_statistics_that_the_last_layer_cannot_hold_move_nothing(estimator: str) -> None:
    """When all batches are through and the others' are ready to be stored."""
    model = everything()
    model.last.running_var = model.last.running_var.half()
    model.last.running_mean = model.last.running_mean.half()
    model.last.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1e5,))
    model.last.forward = lambda values: values
    message = r"layer 'last': a running_var of .* exceeds the range"
    error_that_moves_nothing(model, batches(), match=message, estimator=estimator)


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
    calls = itertools.count()

    def once(module: nn.Module, arguments: tuple[Tensor]) -> None:
        if next(calls) == 0:
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
    assert {key for key in changed(before, snapshot(model)) if not key.endswith(allowed or "\0")} == set()


def test_buffers_outside_of_inference_mode_stay_as_they_are() -> None:
    """Tensors made under `torch.inference_mode()` cannot be written to outside of it."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    error_that_moves_nothing(model, [randn(5, 3)], match="inference", frozen=[])


def test_batches_made_in_inference_mode_work() -> None:
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


def test_an_error_is_raised_even_if_nothing_can_be_restored_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some errors CUDA refuses everything. What the user has to see is the first one, not the last."""

    def refuse(*values: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.Tensor, "copy_", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    with pytest.raises(IndexError, match="theirs"), undisturbed(nn.BatchNorm1d(3)):
        raise IndexError("theirs")
    with pytest.raises(RuntimeError, match="device-side"), undisturbed(nn.BatchNorm1d(3)):
        pass  # what cannot be restored without an error is one itself
