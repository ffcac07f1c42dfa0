"""A model with what makes checkpoints interesting: BatchNorm, tied weights, a half-precision and an integer buffer."""

from __future__ import annotations

import torch
from torch import nn

SIZE, CLASSES = 6, 5


class Net(nn.Module):
    """Convolution, BatchNorm, a linear layer of odd sizes (uneven when sharded), frozen buffers of other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(3 * (SIZE - 2) ** 2, 7)
        self.head = nn.Linear(7, CLASSES)
        self.register_buffer("temperature", torch.tensor(0.5, dtype=torch.bfloat16))
        self.register_buffer("labels", torch.arange(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.stem(images))).flatten(1)
        return self.head(torch.tanh(self.hidden(features))) / self.temperature.float()


def batches(count: int, size: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns batches of random images and labels."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, SIZE, SIZE, generator=random), torch.randint(CLASSES, (size,), generator=random))
        for _ in range(count)
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Takes one step of training; returns the loss."""
    images, labels = batch
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
