"""The arithmetic of a mean: float64 sums in checkpoint order, and one true division."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# Returns the values of the input with an index, flat and real, on the device. They stand until the next call.
Chunk = Callable[[int], torch.Tensor]


def mean_of_float64(chunk: Chunk, count: torch.Tensor) -> torch.Tensor:
    """Means of float64 inputs, where the sum itself rounds and can overflow.

    What each addition loses is kept and added at the end (TwoSum: Knuth, The Art of Computer Programming, vol. 2,
    section 4.2.2, theorem B). Elements that are equal in all checkpoints are taken as they are, and a sum that
    overflows is taken again of inputs scaled by a power of two.
    """
    first = chunk(0).clone()
    number = int(count.item())
    total, lost = first.clone(), torch.zeros_like(first)
    equal = torch.ones_like(first, dtype=torch.bool)
    for index in range(1, number):
        other = chunk(index)
        equal &= other.view(torch.int64).eq(first.view(torch.int64))
        after = total + other
        kept = after - total
        lost += (total - (after - kept)) + (other - kept)
        total = after
    total += lost
    overflowed = total.isfinite().logical_not_()  # the sum, or a step on the way to what was lost
    mean = total.div(count)
    if overflowed.any():
        scale = 2.0 ** -math.ceil(math.log2(number))
        scaled = chunk(0) * scale
        for index in range(1, number):
            scaled.add_(chunk(index) * scale)
        mean = torch.where(overflowed, scaled.div_(count).div_(scale), mean)
    return torch.where(equal, first, mean)


def mean_of_narrower(
    chunk: Chunk, count: torch.Tensor, number: int, total: torch.Tensor, wide: torch.Tensor, single: torch.Tensor
) -> torch.Tensor:
    """Returns means of inputs below float64, which no number of finite ones can make overflow.

    Args:
        chunk: gives the inputs.
        count: the number of inputs, as a float64 tensor on the device.
        number: the same.
        total, wide: float64 buffers of at least as many elements; the result lies in ``total``.
        single: a float32 buffer of the same size.
    """
    first = chunk(0)
    total, wide, single = (buffer[: first.numel()] for buffer in (total, wide, single))

    def widened(values: torch.Tensor) -> torch.Tensor:
        # Processors widen float16 in two steps; torch on a CPU does it one by one if asked for both.
        return single.copy_(values) if values.dtype == torch.float16 else values

    total.copy_(widened(first))
    for index in range(1, number):
        total.add_(wide.copy_(widened(chunk(index))))
    # By a tensor on the device: CUDA multiplies by the reciprocal of a Python number.
    return total.div_(count)


def as_real(values: torch.Tensor) -> torch.Tensor:
    """Returns complex values as pairs of real ones; real ones as they are."""
    return values.view(torch.float32) if values.dtype == torch.complex64 else values
