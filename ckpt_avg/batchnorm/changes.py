"""How much a refresh changed the running statistics of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_avg.batchnorm.pools import LayerStatistics


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The running statistics of one layer before and after a refresh, over its channels.

    A shift of a mean is in standard deviations that the layer had before. Channels whose variance was 0 are left out of
    the shifts and of the ratios; if all were, these are NaN.

    Attributes:
        channels: how many.
        mean_before, mean_after: the mean of the running means.
        variance_before, variance_after: the mean of the running variances.
        shift: the root mean square of the shifts of the means.
        largest_shift: the largest shift of a mean.
        ratio: the geometric mean of the variance after, divided by that before; 0 if one became 0.
        least_ratio, largest_ratio: the extremes of the channels.
    """

    channels: int
    mean_before: float
    mean_after: float
    variance_before: float
    variance_after: float
    shift: float
    largest_shift: float
    ratio: float
    least_ratio: float
    largest_ratio: float


def change_of(layer: _BatchNorm, measured: LayerStatistics) -> LayerChange:
    """Returns how the statistics of a layer differ from measured ones; computed in float64 on the CPU."""
    mean, variance, new_mean, new_variance = (
        torch.as_tensor(each).to(device="cpu", dtype=torch.float64).flatten()
        for each in (layer.running_mean, layer.running_var, measured.mean, measured.variance)
    )
    known = variance > 0
    shifts = ((new_mean - mean)[known] / variance[known].sqrt()).abs()
    ratios = new_variance[known] / variance[known]
    nan = torch.full((1,), torch.nan, dtype=torch.float64)
    shifts, ratios = (each if len(each) else nan for each in (shifts, ratios))
    return LayerChange(
        channels=len(mean),
        mean_before=mean.mean().item(),
        mean_after=new_mean.mean().item(),
        variance_before=variance.mean().item(),
        variance_after=new_variance.mean().item(),
        shift=shifts.square().mean().sqrt().item(),
        largest_shift=shifts.max().item(),
        ratio=ratios.log().mean().exp().item(),
        least_ratio=ratios.min().item(),
        largest_ratio=ratios.max().item(),
    )
