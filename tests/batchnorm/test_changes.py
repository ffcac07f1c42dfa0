"""How much a refresh changed the statistics of a layer."""

from __future__ import annotations

import math

import pytest
import torch
from batchnorm.oracles import randn
from torch import nn

from ckpt_avg import refresh_batch_norm


def test_changes_are_those_of_the_buffers() -> None:
    """If it failed, a report would show other statistics than the output has, or had."""
    layer = nn.BatchNorm1d(4)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    change = refresh_batch_norm(nn.Sequential(layer), randn(40, 4).split(8)).changes["0"]
    shifts = ((layer.running_mean - mean) / variance.sqrt()).abs()
    ratios = layer.running_var / variance
    assert change.channels == 4
    assert change.mean_before == pytest.approx(mean.mean().item())
    assert change.mean_after == pytest.approx(layer.running_mean.mean().item(), abs=1e-6)
    assert change.variance_before == pytest.approx(variance.mean().item())
    assert change.variance_after == pytest.approx(layer.running_var.mean().item())
    assert change.shift == pytest.approx(math.sqrt((shifts**2).mean().item()))
    assert change.largest_shift == pytest.approx(shifts.max().item())
    assert change.ratio == pytest.approx(math.prod(ratios.tolist()) ** 0.25)
    assert (change.least_ratio, change.largest_ratio) == pytest.approx((ratios.min().item(), ratios.max().item()))


def test_channels_without_variance_are_left_out() -> None:
    """If it failed, one dead channel would make the numbers of its layer infinite."""
    layer = nn.BatchNorm1d(2)
    layer.running_var.copy_(torch.tensor([0.0, 1.0]))
    model = nn.Sequential(layer)
    change = refresh_batch_norm(model, [randn(16, 2)]).changes["0"]
    assert change.ratio == pytest.approx(layer.running_var[1].item())
    layer.running_var.zero_()
    change = refresh_batch_norm(model, [randn(16, 2)]).changes["0"]
    assert math.isnan(change.shift)
    assert math.isnan(change.ratio)


def test_frozen_layers_have_no_change() -> None:
    """If it failed, a layer that was kept would be shown as refreshed."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    assert refresh_batch_norm(model, [randn(16, 2)], frozen=["0"]).changes.keys() == {"1"}
