"""`refresh_batch_norm`: right statistics, nothing else moved, and every failure named."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ckpt_avg import UserCodeError, refresh_batch_norm

Pair = namedtuple("Pair", ["images", "labels"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def all_at_once(samples: Tensor) -> tuple[Tensor, Tensor, int]:
    """The oracle: mean, unbiased variance and count per channel of all samples together, in float64."""
    channels = samples.double().transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1, correction=1), channels.shape[1]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Right statistics


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(5), (41, 5)),
        (nn.BatchNorm1d(5), (41, 5, 7)),
        (nn.BatchNorm2d(5), (41, 5, 3, 4)),
        (nn.BatchNorm3d(5), (41, 5, 2, 3, 2)),
        (nn.SyncBatchNorm(5), (41, 5, 3, 4)),
    ],
    ids=["1d of 2 dimensions", "1d of 3 dimensions", "2d", "3d", "sync"],
)
def test_statistics_are_those_of_all_samples_at_once(layer: Any, shape: tuple[int, ...]) -> None:
    samples = 3.0 * randn(*shape) + torch.arange(5.0).view(1, -1, *[1] * (len(shape) - 2))
    mean, variance, count = all_at_once(samples)

    report = refresh_batch_norm(nn.Sequential(layer), samples.split([16, 3, 20, 2]))

    assert_close(report.statistics["0"].mean, mean)
    assert_close(report.statistics["0"].variance, variance)
    assert report.statistics["0"].count == count
    assert report.statistics["0"].calls_per_batch == 1
    assert (report.batches, report.samples) == (4, 41)
    assert torch.equal(layer.running_mean, report.statistics["0"].mean.float())
    assert torch.equal(layer.running_var, report.statistics["0"].variance.float())
    assert layer.num_batches_tracked.dtype == torch.int64
    assert layer.num_batches_tracked.item() == 4


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    scale=st.sampled_from([1.0, 1e-6, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_the_split_into_batches_does_not_matter(sizes: list[int], offset: float, scale: float, seed: int) -> None:
    samples = scale * (randn(sum(sizes), 3, 2, 2, seed=seed) + offset)
    mean, variance, _ = all_at_once(samples)
    measured = refresh_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), samples.split(sizes)).statistics["0"]
    magnitude = scale * (1 + abs(offset))
    assert_close(measured.mean / magnitude, mean / magnitude)
    assert_close(measured.variance / scale**2, variance / scale**2, 1e-12 * (1 + abs(offset)))


def test_a_batch_larger_than_one_chunk_is_measured_whole() -> None:
    """Activations are widened to float64 a part at a time; the parts must add up."""
    samples = randn(70, 2, 200, 100) + 5
    mean, variance, count = all_at_once(samples)
    assert samples.numel() > 2 * 1024 * 1024
    measured = refresh_batch_norm(nn.Sequential(nn.BatchNorm2d(2)), [samples[:64], samples[64:]]).statistics["0"]
    assert measured.count == count
    assert_close(measured.mean, mean)
    assert_close(measured.variance, variance)


def test_a_bfloat16_model_stores_the_nearest_bfloat16() -> None:
    layer = nn.BatchNorm2d(4).to(torch.bfloat16)
    samples = (2.3 * randn(50, 4, 3, 3) + 7.7).to(torch.bfloat16)
    mean, variance, _ = all_at_once(samples)

    measured = refresh_batch_norm(nn.Sequential(layer), samples.split(16)).statistics["0"]

    assert_close(measured.mean, mean)
    assert_close(measured.variance, variance)
    for buffer, exact in ((layer.running_mean, mean), (layer.running_var, variance)):
        assert buffer is not None
        assert buffer.dtype == torch.bfloat16
        half_a_step = 2.0 ** (torch.frexp(exact).exponent.double() - 9)
        assert (buffer.double() - exact).abs().le(half_a_step).all()


@pytest.mark.guarantee("no-negative-variance")
@pytest.mark.parametrize("offset", [1e4, 1e6, -1e6])
@pytest.mark.parametrize("size", [2, 100, 1000])
def test_cancellation_never_eats_the_variance(offset: float, size: int) -> None:
    """E[x²] − E[x]² in float32 is off by up to 10⁵ here, and negative for some channels."""
    samples = randn(1000, 8) + offset
    mean, variance, _ = all_at_once(samples)
    naive = samples.square().mean(0) - samples.mean(0).square()
    assert (naive - variance).abs().max() > 0.5

    layer = nn.BatchNorm1d(8)
    refresh_batch_norm(nn.Sequential(layer), samples.split(size))

    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-6, atol=0)


def test_a_constant_channel_has_no_variance() -> None:
    layer = nn.BatchNorm1d(2)
    refresh_batch_norm(nn.Sequential(layer), [torch.full((3, 2), 1e6 + 0.1)] * 7)
    assert layer.running_var.tolist() == [0.0, 0.0]


def test_deeper_layers_see_what_training_shows_them(train: Any) -> None:
    """Each layer normalises by the batch while the next is measured, as torch itself does in train mode."""
    torch.manual_seed(3)
    model = train.make_model().double()
    batches = [batch.double() for batch, _ in itertools.islice(train.train_loader(), 3)]
    batches[-1] = batches[-1][:17]

    reference = train.make_model().double()
    reference.load_state_dict(model.state_dict())
    reference.eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in reference.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.train()
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0])
            )
    with torch.no_grad():
        for batch in batches:
            reference(batch)

    report = refresh_batch_norm(model, batches)

    assert list(report.statistics) == ["features.bn1", "features.bn2", "features.bn3", "classifier.bn"]
    assert list(seen) == list(report.statistics)
    for name, parts in seen.items():
        mean, variance, count = all_at_once(torch.cat(parts))
        assert_close(report.statistics[name].mean, mean)
        assert_close(report.statistics[name].variance, variance)
        assert report.statistics[name].count == count


@pytest.mark.guarantee("layer-used-twice")
def test_a_layer_used_twice_covers_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.once = nn.BatchNorm1d(3)

        def forward(self, values: Tensor) -> Tensor:
            self.once(values)
            return self.norm(values) + self.norm(5 * values + 1)

    samples = randn(12, 3)
    model = Twice()
    report = refresh_batch_norm(model, samples.split(4))
    mean, variance, count = all_at_once(torch.cat([samples, 5 * samples + 1]))
    assert report.statistics["norm"].count == count == 24
    assert_close(report.statistics["norm"].mean, mean)
    assert_close(report.statistics["norm"].variance, variance)
    assert report.statistics["norm"].calls_per_batch == 2
    assert report.used_twice == ("norm",)
    assert model.norm.num_batches_tracked.item() == 3


def test_a_layer_that_some_batches_pass_by_is_measured_on_the_others() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, values: Tensor) -> Tensor:
            return self.norm(values) if len(values) > 4 else values

    samples = randn(15, 3)
    report = refresh_batch_norm(Sometimes(), samples.split([5, 4, 6]))
    mean, variance, count = all_at_once(torch.cat([samples[:5], samples[9:]]))
    assert report.statistics["norm"].count == count
    assert_close(report.statistics["norm"].mean, mean)
    assert_close(report.statistics["norm"].variance, variance)
    assert report.used_twice == ()


def test_a_layer_called_with_a_keyword_is_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, values: Tensor) -> Tensor:
            return self.norm(input=values)

    samples = randn(6, 3)
    measured = refresh_batch_norm(Keyword(), [samples]).statistics["norm"]
    assert_close(measured.mean, all_at_once(samples)[0])


def test_no_gradient_graph_is_left() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    samples = randn(6, 3).requires_grad_()
    report = refresh_batch_norm(model, [samples])
    assert not report.statistics["1"].mean.requires_grad
    assert samples.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_batches_and_samples() -> None:
    calls: list[tuple[int, int]] = []
    refresh_batch_norm(
        nn.Sequential(nn.BatchNorm1d(3)),
        randn(9, 3).split([4, 3, 2]),
        progress=lambda batches, samples: calls.append((batches, samples)),
    )
    assert calls == [(1, 4), (2, 7), (3, 9)]


# ---------------------------------------------------------------------------------------------------------------------
# Against torch's own update_bn


def test_equal_batches_give_the_running_means_of_update_bn() -> None:
    def network() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
        )

    ours, theirs = network(), network()
    loader = DataLoader(TensorDataset(randn(60, 2, 8, 8) + 0.5), batch_size=12)
    refresh_batch_norm(ours, loader)
    torch.optim.swa_utils.update_bn(loader, theirs)
    for index in (1, 4):
        mine, other = ours.get_submodule(str(index)), theirs.get_submodule(str(index))
        torch.testing.assert_close(mine.running_mean, other.running_mean, rtol=1e-5, atol=1e-6)
        # The mean of per-batch variances lacks the spread between batches: near, yet not the same.
        torch.testing.assert_close(mine.running_var, other.running_var, rtol=0.05, atol=0)
        assert mine.num_batches_tracked == other.num_batches_tracked == 5


@pytest.mark.guarantee("small-last-batch")
def test_a_small_last_batch_counts_by_its_samples() -> None:
    """update_bn weights both batches alike: 5 where 20/66 is true."""
    batches = [torch.zeros(64, 1) + 1e-3 * randn(64, 1), torch.full((2, 1), 10.0) + 1e-3 * randn(2, 1, seed=1)]
    mean, variance, _ = all_at_once(torch.cat(batches))
    ours, theirs = nn.Sequential(nn.BatchNorm1d(1)), nn.Sequential(nn.BatchNorm1d(1))
    measured = refresh_batch_norm(ours, batches).statistics["0"]
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert_close(measured.mean, mean)
    assert_close(measured.variance, variance)
    assert mean.item() == pytest.approx(20 / 66, abs=0.01)
    assert theirs[0].running_mean.item() == pytest.approx(5.0, abs=0.01)


def test_dropout_stays_off() -> None:
    """update_bn puts the whole model in train mode, and dropout before the layer doubles the variance."""
    samples = randn(4000, 1)
    mean, variance, _ = all_at_once(samples)
    ours, theirs = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)) for _ in range(2))
    measured = refresh_batch_norm(ours, samples.split(1000)).statistics["1"]
    torch.manual_seed(0)
    torch.optim.swa_utils.update_bn(samples.split(1000), theirs)
    assert_close(measured.mean, mean)
    assert_close(measured.variance, variance)
    assert theirs[1].running_var.item() > 1.8 * variance.item()


def test_the_spread_between_batches_counts() -> None:
    """On ordered data the mean of per-batch variances is far too small."""
    samples = randn(1000, 1).sort(dim=0).values
    mean, variance, _ = all_at_once(samples)
    ours, theirs = nn.Sequential(nn.BatchNorm1d(1)), nn.Sequential(nn.BatchNorm1d(1))
    measured = refresh_batch_norm(ours, samples.split(100)).statistics["0"]
    torch.optim.swa_utils.update_bn(samples.split(100), theirs)
    assert_close(measured.mean, mean)
    assert_close(measured.variance, variance)
    assert theirs[0].running_var.item() < 0.2 * variance.item()


# ---------------------------------------------------------------------------------------------------------------------
# Nothing else moves


class Codebook(nn.Module):
    """Like a vector quantiser or a queue: its buffers learn in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.codes += values.mean((0, 2, 3))
            self.seen += 1
        return values + self.codes.view(1, -1, 1, 1)


class CountingBatchNorm(nn.BatchNorm2d):
    """A user's subclass with a buffer of its own."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("steps", torch.tensor(5))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return super().forward(values)


class ReplacingBatchNorm(nn.BatchNorm2d):
    """A user's subclass that puts new tensors in the place of its buffers instead of writing to them."""

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
            self.running_mean = 0.9 * self.running_mean + 0.1 * values.mean((0, 2, 3))
        return nn.functional.batch_norm(values, None, None, self.weight, self.bias, training=True)


class Awkward(nn.Module):
    """All that a careless refresh would disturb."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))
        self.norm = nn.BatchNorm2d(4)
        self.counting = CountingBatchNorm(4, momentum=None)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.dropout = nn.Dropout(0.5)
        self.codebook = Codebook()
        self.twice = nn.BatchNorm2d(4, momentum=0.3)
        self.frozen = nn.BatchNorm2d(4)
        self.asleep = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5))
        self.asleep.eval()
        self.frozen.eval()
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.head.bias.requires_grad_(False)
        self.last = nn.BatchNorm1d(3)
        self.calls = 0
        self.fail_at = fail_at
        self.norm.register_forward_hook(lambda module, arguments, output: None)
        self.norm.register_forward_pre_hook(lambda module, arguments: None)
        self.twice.register_forward_pre_hook(lambda module, arguments, keywords: None, with_kwargs=True)
        self.twice.weight.register_hook(lambda gradient: gradient)
        self.register_full_backward_hook(lambda module, given, taken: None)

    def train(self, mode: bool = True) -> Awkward:
        raise AssertionError("train() of the user's model was called")

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the model broke down")
        values = self.counting(self.norm(self.conv(values)))
        values = self.untracked(self.instance(values))
        values = self.codebook(self.dropout(values))
        values = self.twice(self.twice(values).relu())
        return self.last(self.head(self.asleep(self.frozen(values)).mean((2, 3))))


REFRESHED = ("norm", "counting", "twice", "asleep.1", "last")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def awkward(fail_at: int = -1) -> Awkward:
    torch.manual_seed(11)
    model = Awkward(fail_at)
    with torch.no_grad():
        for _, buffer in model.named_buffers():
            if buffer.is_floating_point() and buffer.dim() == 1:
                buffer.add_(0.25)
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a user could notice, as comparable values."""
    found: dict[str, object] = {"random state": torch.random.get_rng_state().tolist()}
    for name, module in model.named_modules():
        found[f"{name} mode"] = module.training
        found[f"{name} momentum"] = getattr(module, "momentum", "none")
        found[f"{name} attributes"] = list(vars(module))
        for attribute, value in vars(module).items():
            if "hooks" in attribute:
                found[f"{name} {attribute}"] = list(value.items()) if hasattr(value, "items") else value
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in tensors:
        found[f"{name} bytes"] = bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        found[f"{name} flags"] = (tensor.dtype, tensor.shape, tensor.requires_grad, tensor.grad is None)
    found["state dict"] = list(model.state_dict())
    return found


def moved(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def awkward_batches() -> list[Tensor]:
    return list(randn(20, 2, 6, 6).split([6, 5, 6, 3]))


def test_an_awkward_model_changes_in_its_statistics_alone() -> None:
    model = awkward()
    before = snapshot(model)
    report = refresh_batch_norm(model, awkward_batches(), frozen=["frozen"])
    expected = {f"{layer}.{buffer} bytes" for layer in REFRESHED for buffer in STATISTICS}
    assert moved(before, snapshot(model)) == expected
    assert set(report.statistics) == set(REFRESHED)
    assert report.frozen == ("frozen",)
    assert report.used_twice == ("twice",)


def test_the_measured_statistics_are_the_ones_stored() -> None:
    model = awkward()
    report = refresh_batch_norm(model, awkward_batches(), frozen=["frozen"])
    for layer in REFRESHED:
        module = model.get_submodule(layer)
        assert torch.equal(module.running_mean, report.statistics[layer].mean.float())
        assert torch.equal(module.running_var, report.statistics[layer].variance.float())
        assert module.num_batches_tracked.item() == 4


def test_buffers_that_the_layer_replaces_are_put_back() -> None:
    """Some subclasses assign new tensors to their buffers: after an error the old ones must be there again."""
    model = nn.Sequential(ReplacingBatchNorm(2))
    buffers = dict(model.named_buffers())
    before = snapshot(model)
    with pytest.raises(UserCodeError):
        refresh_batch_norm(model, BrokenLoader(3, OSError("disk gone")))
    assert moved(before, snapshot(model)) == set()

    report = refresh_batch_norm(model, awkward_batches())
    assert torch.equal(model[0].running_mean, report.statistics["0"].mean.float())
    assert model[0].num_batches_tracked.item() == 4
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_the_same_model_gives_the_same_statistics_again() -> None:
    """The measured statistics do not depend on those that were there before, nor on the modes."""
    model = awkward()
    first = refresh_batch_norm(model, awkward_batches(), frozen=["frozen"])
    nn.Module.train(model)
    second = refresh_batch_norm(model, awkward_batches(), frozen=["frozen"])
    for layer in REFRESHED:
        assert torch.equal(first.statistics[layer].mean, second.statistics[layer].mean)
        assert torch.equal(first.statistics[layer].variance, second.statistics[layer].variance)


class BrokenLoader:
    """Raises at a batch; draws random numbers as a shuffling loader does."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error = at, error

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(awkward_batches(), start=1):
            torch.rand(3)
            if number == self.at:
                raise self.error
            yield batch


def fail_by_loader(at: int) -> tuple[Awkward, Any]:
    return awkward(), BrokenLoader(at, OSError("disk gone"))


def fail_by_model(at: int) -> tuple[Awkward, Any]:
    return awkward(fail_at=at), awkward_batches()


def fail_by_interrupt(at: int) -> tuple[Awkward, Any]:
    return awkward(), BrokenLoader(at, KeyboardInterrupt())


def fail_by_nan(at: int) -> tuple[Awkward, Any]:
    batches = awkward_batches()
    batches[at - 1][0, 0, 0, 0] = math.nan
    return awkward(), batches


def fail_by_single_value(at: int) -> tuple[Awkward, Any]:
    """The last layer gets one value per channel, when all others have been measured."""
    batches = awkward_batches()
    batches[at - 1] = batches[at - 1][:1]
    return awkward(), batches


def fail_by_kind(at: int) -> tuple[Awkward, Any]:
    batches: list[object] = [*awkward_batches()]
    batches[at - 1] = "a string"
    return awkward(), batches


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (fail_by_loader, UserCodeError, "the dataloader raised at batch {at}: OSError: disk gone"),
        (fail_by_model, UserCodeError, "the model raised at batch {at} (a tensor of shape"),
        (fail_by_interrupt, KeyboardInterrupt, ""),
        (fail_by_nan, UserCodeError, "layer 'norm', batch {at}: expected finite activations"),
        (fail_by_single_value, UserCodeError, "layer 'last', batch {at}: expected more than one value per channel"),
        (fail_by_kind, UserCodeError, "batch {at}: got a str"),
    ],
)
def test_after_any_failure_the_model_is_as_before(
    failure: Callable[[int], tuple[Awkward, Any]], error: type[BaseException], says: str, at: int
) -> None:
    model, batches = failure(at)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        refresh_batch_norm(model, batches, frozen=["frozen"])
    assert moved(before, snapshot(model)) == set()
    assert says.format(at=at) in str(caught.value)


def test_a_failure_of_the_progress_callback_restores_the_model() -> None:
    def progress(batches: int, samples: int) -> None:
        raise BrokenPipeError

    model = awkward()
    before = snapshot(model)
    with pytest.raises(BrokenPipeError):
        refresh_batch_norm(model, awkward_batches(), frozen=["frozen"], progress=progress)
    assert moved(before, snapshot(model)) == set()


def test_a_shuffling_loader_leaves_the_random_state() -> None:
    loader = DataLoader(TensorDataset(randn(20, 3)), batch_size=5, shuffle=True)
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = torch.random.get_rng_state()
    refresh_batch_norm(model, loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_and_untracked_layers_are_used_as_in_evaluation() -> None:
    """A frozen layer normalises by its kept statistics, so the next layer sees what it will see in use."""
    frozen = nn.BatchNorm1d(2)
    frozen.running_mean = torch.tensor([3.0, -1.0])
    frozen.running_var = torch.tensor([4.0, 0.25])
    model = nn.Sequential(frozen, nn.BatchNorm1d(2))
    model.train()
    samples = randn(30, 2) + 1
    with torch.no_grad():
        expected = (samples - torch.tensor([3.0, -1.0])) / torch.sqrt(torch.tensor([4.0, 0.25]) + frozen.eps)
    report = refresh_batch_norm(model, [samples], frozen=["0"])
    assert list(report.statistics) == ["1"]
    torch.testing.assert_close(report.statistics["1"].mean, all_at_once(expected)[0], rtol=1e-5, atol=1e-6)
    assert frozen.running_mean.tolist() == [3.0, -1.0]
    assert frozen.num_batches_tracked.item() == 0


def test_a_model_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    report = refresh_batch_norm(model, [randn(4, 3)])
    assert report.statistics == {}


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong is named


def failure_of(batches: Any, model: nn.Module | None = None, **options: Any) -> str:
    model = model if model is not None else nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(UserCodeError) as caught:
        refresh_batch_norm(model, batches, **options)
    assert caught.value.exit_code == 7
    return str(caught.value)


@pytest.mark.parametrize("max_batches", [None, 5])
def test_an_empty_loader_is_refused(max_batches: int | None) -> None:
    message = failure_of([], max_batches=max_batches)
    assert "expected at least one batch, got an empty dataloader" in message
    assert "factory" in message


def test_a_used_up_generator_is_refused() -> None:
    """A second run would otherwise keep statistics that belong to other weights."""
    generator = (randn(4, 3, seed=seed) for seed in range(2))
    model = nn.Sequential(nn.BatchNorm1d(3))
    refresh_batch_norm(model, generator)
    message = failure_of(generator, model)
    assert "empty dataloader" in message
    assert "used up" in message


@pytest.mark.parametrize("shape", [(1, 3), (0, 3)])
def test_one_value_per_channel_names_layer_and_batch(shape: tuple[int, int]) -> None:
    message = failure_of([randn(4, 3), randn(4, 3), torch.ones(shape)])
    assert "layer '0', batch 3" in message
    assert f"got an input of shape {list(shape)}" in message
    assert "drop_last=True" in message


@pytest.mark.guarantee("refresh-fails")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_layer_that_sees_nonfinite_values_is_named(value: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[1].bias[1] = value
    message = failure_of([randn(4, 3), randn(4, 3)], model)
    assert "layer '2', batch 1" in message
    assert "expected finite activations, got NaN or Inf" in message
    assert "check the data and the weights" in message


def test_statistics_beyond_the_range_of_the_buffer_are_refused() -> None:
    """A float16 buffer cannot hold a variance of 90,000; an infinite one would turn every output into zero."""
    layer = nn.BatchNorm1d(2).half()
    message = failure_of([(300 * randn(50, 2)).half()], nn.Sequential(layer))
    assert "'0'" in message
    assert "float16" in message
    assert layer.running_var.tolist() == [1.0, 1.0]
    assert layer.num_batches_tracked.item() == 0


def test_layers_that_no_batch_reaches_are_listed() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.left, self.right = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, values: Tensor) -> Tensor:
            return self.used(values)

    model = Detour()
    before = snapshot(model)
    message = failure_of([randn(4, 3)], model)
    assert "got no input for 'left', 'right'" in message
    assert "'used'" not in message
    assert "forward_batch" in message
    assert moved(before, snapshot(model)) == set()


def test_an_endless_loader_ends_at_max_batches() -> None:
    drawn = itertools.count(1)
    last = 0

    def endless() -> Iterator[Tensor]:
        nonlocal last
        for last in drawn:
            yield randn(4, 3, seed=last)

    report = refresh_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), endless(), max_batches=6)
    assert (report.batches, report.samples, last) == (6, 24, 6)


def test_max_batches_beyond_the_loader_takes_all() -> None:
    assert refresh_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), randn(6, 3).split(2), max_batches=99).batches == 3


@pytest.mark.parametrize("max_batches", [None, 5])
def test_a_loader_that_cannot_start_is_named(max_batches: int | None) -> None:
    class Stubborn:
        def __iter__(self) -> Iterator[Tensor]:
            raise ConnectionError("no data server")

    message = failure_of(Stubborn(), max_batches=max_batches)
    assert "the dataloader raised at batch 1: ConnectionError: no data server" in message


def test_the_original_exception_is_kept_as_the_cause() -> None:
    error = OSError("disk gone")
    with pytest.raises(UserCodeError) as caught:
        refresh_batch_norm(awkward(), BrokenLoader(2, error))
    assert caught.value.__cause__ is error


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of batches


class Named(nn.Module):
    """Takes its input by position or by keyword, and a second argument that it does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm(images)


SAMPLES = randn(10, 3) + 2
LABELS = torch.arange(10)


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda images, labels: images,
        lambda images, labels: (images, labels),
        lambda images, labels: [images, labels],
        lambda images, labels: [images],
        Pair,
        lambda images, labels: {"images": images},
        lambda images, labels: {"labels": labels, "images": images},
        lambda images, labels: UserDict(images=images, labels=labels),
    ],
    ids=["tensor", "tuple", "list", "list of one", "namedtuple", "dict", "dict of two", "mapping that is no dict"],
)
def test_each_kind_of_batch_reaches_the_model(batch_of: Callable[[Tensor, Tensor], Any]) -> None:
    pairs = zip(SAMPLES.split([6, 4]), LABELS.split([6, 4]), strict=True)
    report = refresh_batch_norm(Named(), [batch_of(images, labels) for images, labels in pairs])
    mean, variance, _ = all_at_once(SAMPLES)
    assert_close(report.statistics["norm"].mean, mean)
    assert_close(report.statistics["norm"].variance, variance)
    assert report.samples == 10


def test_forward_batch_takes_any_batch() -> None:
    class Graph:
        def __init__(self, nodes: Tensor) -> None:
            self.nodes = nodes

    given: list[object] = []

    def forward_batch(model: nn.Module, batch: Graph) -> None:
        given.append(model)
        model(batch.nodes)

    model = Named()
    report = refresh_batch_norm(model, [Graph(part) for part in SAMPLES.split(5)], forward_batch=forward_batch)
    assert_close(report.statistics["norm"].mean, all_at_once(SAMPLES)[0])
    assert given == [model, model]
    assert report.batches == 2


def test_forward_batch_that_raises_is_named() -> None:
    def forward_batch(model: nn.Module, batch: Tensor) -> None:
        raise KeyError("pixel_values")

    message = failure_of([SAMPLES], forward_batch=forward_batch)
    assert "batch 1" in message
    assert "KeyError: 'pixel_values'" in message


@pytest.mark.parametrize("batch", ["text", 3, None, (), [], {1.5}, object()], ids=lambda batch: type(batch).__name__)
def test_other_batches_are_refused_with_what_is_accepted(batch: object) -> None:
    message = failure_of([batch])
    assert f"batch 1: got a {type(batch).__name__}" in message
    for accepted in ("a tensor", "a tuple or list", "a mapping", "forward_batch(model, batch)"):
        assert accepted in message


def test_a_mapping_with_other_keywords_names_them() -> None:
    message = failure_of([{"pixels": SAMPLES}], Named())
    assert "the model raised at batch 1 (a mapping with the keys 'pixels')" in message
    assert "TypeError" in message
    assert "Accepted batches" in message


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


class Rows(Dataset[Tensor]):
    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Tensor:
        if index == 5 and self.trouble == "raise":
            raise ValueError("row 5 is bad")
        if index == 5 and self.trouble == "die":
            time.sleep(0.2)  # what was queued before is delivered, so no lock dies with the process
            os.kill(os.getpid(), signal.SIGKILL)
        return SAMPLES[index]


def workers(trouble: str = "") -> DataLoader[Tensor]:
    return DataLoader(Rows(trouble), batch_size=2, num_workers=2, multiprocessing_context="fork")


on_any_machine = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@on_any_machine
def test_loader_workers_deliver_every_batch() -> None:
    measured = refresh_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), workers()).statistics["0"]
    mean, variance, _ = all_at_once(SAMPLES)
    assert_close(measured.mean, mean)
    assert_close(measured.variance, variance)


@on_any_machine
def test_a_worker_that_raises_is_named() -> None:
    message = failure_of(workers("raise"))
    assert "the dataloader raised at batch 3" in message
    assert "row 5 is bad" in message


@on_any_machine
def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    message = failure_of(workers("die"))
    assert "the dataloader raised at batch" in message
    assert "exited unexpectedly" in message or "killed" in message


class CallCounter(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values


def test_buffers_that_move_in_evaluation_mode_are_put_back() -> None:
    model = nn.Sequential(CallCounter(), nn.BatchNorm1d(3))
    refresh_batch_norm(model, [randn(8, 3), randn(8, 3)])
    assert model[0].calls.item() == 0
    assert model[1].num_batches_tracked.item() == 2


def test_channels_elsewhere_are_refused_before_anything_is_stored() -> None:
    class ChannelsLast(nn.BatchNorm1d):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(nn.BatchNorm1d(5), ChannelsLast(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserCodeError, match=r"layer '1', batch 1: expected 4 channels in dimension 1"):
        refresh_batch_norm(model, [randn(8, 5, 4)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_huge_sample_is_measured_piece_by_piece() -> None:
    """Split along positions, too; the pieces pool to what all of them give at once."""
    samples = randn(2, 3, 1100, 1100) * 3 + 5
    model = nn.Sequential(nn.BatchNorm2d(3))
    refresh_batch_norm(model, [samples])
    mean, variance, _ = all_at_once(samples)
    torch.testing.assert_close(model[0].running_mean, mean.float())
    torch.testing.assert_close(model[0].running_var, variance.float())
