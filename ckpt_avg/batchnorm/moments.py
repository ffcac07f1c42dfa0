"""Count, mean and centred sum of squares per channel, in float64: of one input, and pooled over many.

Values are converted to float64 a piece at a time, so that the working memory does not grow with the activations, and
centred where their mean is far from zero, so that no digits cancel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_PIECE = 1024 * 1024  # elements converted to float64 at a time, 8 MiB
_CUDA_PIECE = 16 * 1024 * 1024  # on CUDA a kernel must do more work than its launch costs
_CANCELLED = 0.2  # the squares are centred if less than this part of their sum around zero is left


@dataclass(frozen=True, slots=True)
class Moments:
    """The moments of a set of values.

    Attributes:
        count: values per channel; float64, (channels,), if channels have different numbers of them.
        mean: float64, (channels,).
        squares: float64, (channels,): the sum of the squared distances from the mean.
    """

    count: int | torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    def pooled_with(self, other: Moments) -> Moments:
        """Returns the moments of both sets together.

        Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances": with
        d = m₂ − m₁ and N = n₁ + n₂ the mean is m₁ + d·n₂/N, and the sum of squares s₁ + s₂ + d²·n₁·n₂/N.
        """
        total = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / total)
        squares = self.squares + other.squares + delta.square() * (self.count * other.count / total)
        return Moments(total, mean, squares)

    @property
    def variance(self) -> torch.Tensor:
        """The unbiased variance, float64, (channels,): divided by count − 1."""
        return self.squares / (self.count - 1)

    @property
    def biased_variance(self) -> torch.Tensor:
        """The variance that a batch is normalised by, float64, (channels,): divided by count."""
        return self.squares / self.count


def moments_of(values: torch.Tensor) -> Moments:
    """Returns the moments of values shaped (samples, channels, …), not empty, of any float dtype and strides."""
    if values.dim() > 2 and values.stride(1) == 1:  # channels last: each position is a row
        flat = values.movedim(1, -1).reshape(-1, values.shape[1], 1)
    else:
        flat = values.unsqueeze(2) if values.dim() == 2 else values.flatten(2)
    piece = _CUDA_PIECE if values.is_cuda else _PIECE
    if values.numel() <= piece:
        return _moments_of_piece(flat)
    samples = max(1, piece // flat[0].numel())
    positions = flat.shape[2] if samples > 1 else max(1, piece // flat.shape[1])
    parts = [part for some in torch.split(flat, samples) for part in torch.split(some, positions, dim=2)]
    return functools.reduce(Moments.pooled_with, map(_moments_of_piece, parts))


def _moments_of_piece(part: torch.Tensor) -> Moments:
    """Returns the moments of values shaped (samples, channels, positions).

    The squares are first summed around zero, and n·mean² is subtracted, which avoids writing centred values. That
    cancels digits in channels whose mean is far from zero. If less than `_CANCELLED` of the sum is left, they are
    summed again around the mean.
    """
    if part.is_cuda:
        return _moments_in_few_kernels(part)
    wide = part.to(torch.float64, copy=True)
    count = wide.shape[0] * wide.shape[2]
    if wide.shape[2] == 1:
        rows = wide.squeeze(2)
        mean = rows.mean(0)
        return Moments(count, mean, rows.sub_(mean).square_().sum(0))
    # vector_norm would be faster, but adds values one by one and loses digits with a million of them.
    mean = wide.sum(2).sum(0).div_(count)
    total = wide.square_().sum(2).sum(0)
    squares = torch.addcmul(total, mean, mean, value=-count)
    far = (squares < _CANCELLED * total).nonzero().squeeze(1)
    if far.numel():
        centred = part.index_select(1, far).to(torch.float64).sub_(mean[far].view(1, -1, 1))
        squares[far] = centred.square_().sum(2).sum(0)
    return Moments(count, mean, squares)


def _moments_in_few_kernels(part: torch.Tensor) -> Moments:
    """Returns the same, for CUDA: one kernel widens, and one measures, by updates of Welford's kind.

    On a CPU these take ten times as long as sums. They round the mean again and again, so a mean far from zero would
    cost digits of the squares. The distances from any one value of the channel have a mean near zero.
    """
    count = part.shape[0] * part.shape[2]
    first = part[:1, :, :1].to(torch.float64)
    # The sum of squares is divided by count - correction, which is 1.
    squares, mean = torch.var_mean(part - first, (0, 2), correction=count - 1)
    return Moments(count, mean + first.view(-1), squares)
