"""What BatchNorm statistics should be, computed in another way than the package does."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_at_once(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel of all samples together, in float64."""
    channels = samples.double().transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1, correction=1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_measured(measured: object, samples: Tensor, tolerance: float = 1e-12) -> None:
    """Asserts that the statistics of a layer are those of all these samples together."""
    mean, variance = all_at_once(samples)
    assert_close(measured.mean, mean, tolerance)  # type: ignore[attr-defined]
    assert_close(measured.variance, variance, tolerance)  # type: ignore[attr-defined]
    assert measured.count == samples.numel() // samples.shape[1]  # type: ignore[attr-defined]
