"""`refresh_batch_norm`: the statistics of all samples, and an error that names what is wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from batchnorm.oracles import all_at_once, assert_close, assert_measured, model_of, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from user_code.everything import LAYERS, batches, changed, everything, shuffled, snapshot

from ckpt_avg import UserCodeError, refresh_batch_norm

# -- The statistics -------------------------------------------------------------------------------------------------


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
    report = refresh_batch_norm(nn.Sequential(layer), samples.split([16, 3, 20, 2]))
    assert_measured(report.statistics["0"], samples)
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
    mean, variance = all_at_once(samples)
    measured = refresh_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), samples.split(sizes)).statistics["0"]
    magnitude = scale * (1 + abs(offset))
    assert_close(measured.mean / magnitude, mean / magnitude)
    assert_close(measured.variance / scale**2, variance / scale**2, 1e-12 * (1 + abs(offset)))


@pytest.mark.guarantee("no-negative-variance")
@pytest.mark.parametrize("offset", [1e4, 1e6, -1e6])
@pytest.mark.parametrize("size", [2, 100, 1000])
def test_cancellation_costs_no_digit_of_the_variance(offset: float, size: int) -> None:
    """E[x²] − E[x]² in float32 is off by up to 10⁵ here, and negative for some channels."""
    samples = randn(1000, 8) + offset
    mean, variance = all_at_once(samples)
    naive = samples.square().mean(0) - samples.mean(0).square()
    assert (naive - variance).abs().max() > 0.5
    assert abs(offset) < 1e6 or (naive < 0).any()

    layer = nn.BatchNorm1d(8)
    refresh_batch_norm(nn.Sequential(layer), samples.split(size))

    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-6, atol=0)


@pytest.mark.guarantee("no-negative-variance")
def test_a_constant_channel_has_no_variance() -> None:
    layer = nn.BatchNorm1d(2)
    refresh_batch_norm(nn.Sequential(layer), [torch.full((3, 2), 1e6 + 0.1)] * 7)
    assert layer.running_var.tolist() == [0.0, 0.0]


@pytest.mark.guarantee("layer-used-twice")
def test_a_layer_used_twice_covers_both_uses() -> None:
    samples = randn(12, 3)
    model = model_of(
        lambda model, values: model.once(model.norm(values) + model.norm(5 * values + 1)),
        norm=nn.BatchNorm1d(3),
        once=nn.BatchNorm1d(3),
    )
    report = refresh_batch_norm(model, samples.split(4))
    assert_measured(report.statistics["norm"], torch.cat([samples, 5 * samples + 1]))
    assert report.statistics["norm"].calls_per_batch == 2
    assert report.used_twice == ("norm",)
    assert model.norm.num_batches_tracked.item() == 3


def test_a_layer_that_some_batches_skip_is_measured_on_the_others() -> None:
    def sometimes() -> Any:
        return model_of(lambda model, x: model.norm(x) if len(x) > 4 else x, norm=nn.BatchNorm1d(3)).double()

    samples = randn(15, 3).double()
    report = refresh_batch_norm(sometimes(), samples.split([5, 4, 6]))
    assert_measured(report.statistics["norm"], torch.cat([samples[:5], samples[9:]]))
    assert report.used_twice == ()

    ours, theirs = sometimes(), sometimes()
    report = refresh_batch_norm(ours, samples.split([5, 4, 6]), estimator="batch-mean")
    update_bn(samples.split([5, 4, 6]), theirs)
    assert_close(ours.norm.running_mean, theirs.norm.running_mean)
    assert_close(ours.norm.running_var, theirs.norm.running_var)
    assert ours.norm.num_batches_tracked == theirs.norm.num_batches_tracked == 2
    assert report.statistics["norm"].count == 11


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


# -- Against torch's own update_bn ----------------------------------------------------------------------------------


def test_equal_batches_give_the_running_means_of_update_bn() -> None:
    def network() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
        )

    ours, theirs = network(), network()
    loader = DataLoader(TensorDataset(randn(60, 2, 8, 8) + 0.5), batch_size=12)
    refresh_batch_norm(ours, loader)
    update_bn(loader, theirs)
    for index in (1, 4):
        mine, other = ours.get_submodule(str(index)), theirs.get_submodule(str(index))
        torch.testing.assert_close(mine.running_mean, other.running_mean, rtol=1e-5, atol=1e-6)
        # The mean of per-batch variances lacks the spread between batches: near, yet not the same.
        torch.testing.assert_close(mine.running_var, other.running_var, rtol=0.05, atol=0)
        assert mine.num_batches_tracked == other.num_batches_tracked == 5


ALIKE, FAR = torch.zeros(64, 1) + 1e-3 * randn(64, 1), torch.full((2, 1), 10.0) + 1e-3 * randn(2, 1, seed=1)
SORTED = randn(1000, 1).sort(dim=0).values
CASES: dict[str, tuple[nn.Module, list[Tensor], Callable[[Any, Tensor, Tensor], bool]]] = {
    # update_bn weights both batches alike: 5 where 20/66 is true.
    "a small last batch": (
        nn.Identity(),
        [ALIKE, FAR],
        lambda theirs, mean, _: abs(theirs.running_mean - 5) < 0.01 and abs(mean - 20 / 66) < 0.01,
    ),
    # update_bn puts the whole model in train mode, and dropout before the layer doubles the variance.
    "dropout": (
        nn.Dropout(0.5),
        list(randn(4000, 1).split(1000)),
        lambda theirs, _, variance: theirs.running_var > 1.8 * variance,
    ),
    # On ordered data the mean of per-batch variances is far too small.
    "ordered data": (
        nn.Identity(),
        list(SORTED.split(100)),
        lambda theirs, _, variance: theirs.running_var < 0.2 * variance,
    ),
}


@pytest.mark.guarantee("small-last-batch", "refresh-only")
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_right_in_the_cases_in_which_those_of_update_bn_are_not(case: str) -> None:
    before, samples, is_wrong = CASES[case]
    ours, theirs = (nn.Sequential(before, nn.BatchNorm1d(1)) for _ in range(2))
    report = refresh_batch_norm(ours, samples)
    assert_measured(report.statistics["1"], torch.cat(samples))
    torch.manual_seed(0)
    update_bn(samples, theirs)
    assert is_wrong(theirs[1], *all_at_once(torch.cat(samples)))


# -- Nothing else changes (see also tests/user_code/test_isolation.py) ----------------------------------------------


class ReplacingBatchNorm(nn.BatchNorm2d):
    """A user's subclass that replaces its buffers by new tensors instead of writing to them."""

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
            self.running_mean = 0.9 * self.running_mean + 0.1 * values.mean((0, 2, 3))
        return nn.functional.batch_norm(values, None, None, self.weight, self.bias, training=True)


def test_buffers_that_the_layer_replaces_are_put_back() -> None:
    model = nn.Sequential(ReplacingBatchNorm(2))
    buffers = dict(model.named_buffers())
    before = snapshot(model)
    with pytest.raises(UserCodeError):
        refresh_batch_norm(model, shuffled(3, OSError("disk gone")))
    assert changed(before, snapshot(model)) == set()

    report = refresh_batch_norm(model, batches())
    assert torch.equal(model[0].running_mean, report.statistics["0"].mean.float())
    assert model[0].num_batches_tracked.item() == 3
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_the_same_model_gives_the_same_statistics_again() -> None:
    """The measured statistics don't depend on those that were there before, nor on the modes."""
    model = everything()
    first = refresh_batch_norm(model, batches(), frozen=["frozen"])
    nn.Module.train(model)
    second = refresh_batch_norm(model, batches(), frozen=["frozen"])
    for layer in LAYERS:
        assert torch.equal(first.statistics[layer].mean, second.statistics[layer].mean)
        assert torch.equal(first.statistics[layer].variance, second.statistics[layer].variance)


def test_a_frozen_layer_is_used_as_in_evaluation() -> None:
    """It normalises by the statistics that it keeps, so the next layer sees what it will see in use."""
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


def test_a_model_without_statistics_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    report = refresh_batch_norm(model, [randn(4, 3)])
    assert report.statistics == {}


# -- What is refused ------------------------------------------------------------------------------------------------


def failure_of(batches: Any, model: nn.Module | None = None, **options: Any) -> str:
    model = model if model is not None else nn.Sequential(nn.BatchNorm1d(3))
    before = snapshot(model)
    with pytest.raises(UserCodeError) as caught:
        refresh_batch_norm(model, batches, **options)
    assert caught.value.exit_code == 7
    assert changed(before, snapshot(model)) == set()
    return str(caught.value)


@pytest.mark.parametrize("max_batches", [None, 5])
def test_a_loader_that_is_empty_used_up_or_cannot_start_is_refused(max_batches: int | None) -> None:
    """A second run would otherwise keep statistics that belong to other weights."""
    message = "BatchNorm refresh: the dataloader is empty. A generator is used up after one pass: make a new one in the"
    assert message in failure_of([], max_batches=max_batches)
    generator = (randn(4, 3, seed=seed) for seed in range(2))
    model = nn.Sequential(nn.BatchNorm1d(3))
    refresh_batch_norm(model, generator, max_batches=max_batches)
    assert message in failure_of(generator, model, max_batches=max_batches)

    class Stubborn:
        def __iter__(self) -> Iterator[Tensor]:
            raise ConnectionError("no data server")

    message = failure_of(Stubborn(), max_batches=max_batches)
    assert "the dataloader raised at batch 1: ConnectionError: no data server" in message


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
    assert "layer '2', batch 1: the activations contain NaN or Inf" in message
    assert "check the data and the weights" in message


def test_a_model_that_fails_after_nan_is_refused_for_the_nan() -> None:
    """What fails may be far behind the layer that saw NaN first, and its message may say nothing of it."""

    def forward(model: Any, values: Tensor) -> Tensor:
        return torch.bernoulli(model.norm(values).sigmoid())  # which NaN makes torch refuse

    model = model_of(forward, norm=nn.BatchNorm1d(3))
    message = failure_of([randn(4, 3), torch.full((4, 3), math.nan)], model)
    assert "layer 'norm', batch 2: the activations contain NaN or Inf" in message


def test_batches_that_pass_other_layers_in_another_order_are_all_pooled() -> None:
    """Layers of different sizes, called in turns, in varying numbers, with varying batches."""
    layers = {name: nn.BatchNorm1d(channels) for name, channels in (("narrow", 2), ("wide", 5))}
    orders = [["narrow", "wide"], ["wide", "narrow"], ["wide"], ["narrow", "wide", "narrow"], ["wide"], ["wide"]]
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    remaining = iter(orders)

    def forward(model: Any, values: Tensor) -> Tensor:
        for name in next(remaining):
            seen[name].append(values[: 2 + len(seen[name]), : layers[name].num_features])
            getattr(model, name)(seen[name][-1])
        return values

    report = refresh_batch_norm(model_of(forward, **layers), [3 * randn(9, 5, seed=seed) + 1 for seed in range(6)])
    for name, parts in seen.items():
        assert_measured(report.statistics[name], torch.cat(parts))


def test_statistics_beyond_the_range_of_the_buffer_are_refused() -> None:
    """A float16 buffer cannot hold a variance of 90,000; an infinite one would turn every output into zero."""
    message = failure_of([(300 * randn(50, 2)).half()], nn.Sequential(nn.BatchNorm1d(2).half()))
    assert "layer '0': a running_var of " in message
    assert "exceeds the range of torch.float16. Choose a wider dtype" in message


def test_layers_that_no_batch_reaches_are_listed() -> None:
    layers = {name: nn.BatchNorm1d(3) for name in ("used", "left", "right")}
    message = failure_of([randn(4, 3)], model_of(lambda model, values: model.used(values), **layers))
    assert (
        "no batch reaches the BatchNorm layers 'left', 'right'. If only training uses them, write a forward" in message
    )


def test_layers_that_only_training_uses_are_measured_by_a_forward_batch_that_uses_them() -> None:
    """As the docs show it: the flag of the model alone is set, so dropout stays off; afterwards it is as before."""

    def forward(model: Any, values: Tensor) -> Tensor:
        return model.main(values) + (model.auxiliary(model.dropout(values)) if model.training else 0)

    def forward_batch(model: nn.Module, batch: Tensor) -> None:
        model.training = True
        model(batch)

    layers = {"main": nn.BatchNorm1d(3), "auxiliary": nn.BatchNorm1d(3), "dropout": nn.Dropout(0.5)}
    model = model_of(forward, **layers).eval()
    values = randn(8, 3)
    report = refresh_batch_norm(model, [values], forward_batch=forward_batch)
    assert_measured(report.statistics["auxiliary"], values)
    assert not any(module.training for module in model.modules())


def test_a_layer_whose_forward_is_called_directly_is_named_with_the_reason() -> None:
    message = failure_of([randn(4, 3)], model_of(lambda model, values: model.bn.forward(values), bn=nn.BatchNorm1d(3)))
    assert "no batch reaches the BatchNorm layers 'bn'" in message
    assert "layer.forward(x) is not measured" in message


def test_another_position_of_the_channels_is_refused() -> None:
    class ChannelsLast(nn.BatchNorm1d):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values.transpose(1, 2)).transpose(1, 2)

    message = failure_of([randn(8, 5, 4)], nn.Sequential(nn.BatchNorm1d(5), ChannelsLast(4)))
    assert "layer '1', batch 1: expected 4 channels in dimension 1" in message


@pytest.mark.guarantee("endless-loader")
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
