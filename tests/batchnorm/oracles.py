"""Small models, and what their BatchNorm statistics should be, computed in another way than the package does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_of(forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> Any:
    """A module with these layers and this forward, in train mode."""

    class Model(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return forward(self, values)

    model = Model()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


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
