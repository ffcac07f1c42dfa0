"""The arithmetic of one element: a float64 sum in checkpoint order, one true division, one correct rounding.

torch casts float64 to the narrow dtypes through float32, and two roundings are not one: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1.0 in
bfloat16, but 1.0078125 is nearest. Rounding the first step to odd makes the second one correct (Boldo & Melquiond 2008,
"Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4)):
float32 has more than two bits beyond every narrower format, subnormals included.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# Returns the values of one input, flat and real, on the device. Valid until the next call.
Values = Callable[[int], torch.Tensor]

_LOST = 2**29 - 1  # the bits of a float64 that a float32 cannot store


def mean_of_narrower(
    values: Values, count: torch.Tensor, number: int, total: torch.Tensor, wide: torch.Tensor, single: torch.Tensor
) -> torch.Tensor:
    """Returns the float64 means of inputs narrower than float64, whose sum cannot overflow.

    Args:
        values: returns an input.
        count: the number of inputs, as a float64 tensor on the device.
        number: the same as an int.
        total, wide: float64 buffers of at least as many elements; ``total`` contains the result.
        single: a float32 buffer of the same size.
    """
    first = values(0)
    total, wide, single = (buffer[: first.numel()] for buffer in (total, wide, single))

    def widened(narrow: torch.Tensor) -> torch.Tensor:
        # Processors widen float16 in two steps; in one step, torch on the CPU converts element by element.
        return single.copy_(narrow) if narrow.dtype == torch.float16 else narrow

    total.copy_(widened(first))
    for index in range(1, number):
        total.add_(wide.copy_(widened(values(index))))
    # The divisor is a tensor on the device: by a Python number, CUDA multiplies by the reciprocal.
    return total.div_(count)


def mean_of_float64(values: Values, count: torch.Tensor) -> torch.Tensor:
    """Returns the means of float64 inputs, whose sum itself rounds and can overflow.

    What each addition loses is summed separately and added at the end (TwoSum: Knuth, The Art of Computer Programming,
    vol. 2, section 4.2.2, theorem B). Elements that are equal in all inputs are copied. Sums that overflow are computed
    again from inputs scaled by a power of two.
    """
    first = values(0).clone()
    number = int(count.item())
    total, lost = first.clone(), torch.zeros_like(first)
    equal = torch.ones_like(first, dtype=torch.bool)
    for index in range(1, number):
        other = values(index)
        equal &= other.view(torch.int64).eq(first.view(torch.int64))
        after = total + other
        kept = after - total
        lost += (total - (after - kept)) + (other - kept)
        total = after
    total += lost
    overflowed = total.isfinite().logical_not_()  # the sum, or a step of what was lost
    mean = total.div(count)
    if overflowed.any():
        scale = 2.0 ** -math.ceil(math.log2(number))
        scaled = values(0) * scale
        for index in range(1, number):
            scaled.add_(values(index) * scale)
        mean = torch.where(overflowed, scaled.div_(count).div_(scale), mean)
    return torch.where(equal, first, mean)


def as_real(values: torch.Tensor) -> torch.Tensor:
    """Returns complex values as pairs of real ones, and real values unchanged."""
    return values.view(torch.float32) if values.dtype == torch.complex64 else values


def round_to(
    values: torch.Tensor, dtype: torch.dtype, scratch: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Returns float64 ``values`` in ``dtype``, each rounded once, to nearest, ties to even.

    A value out of the range of ``dtype`` becomes infinite, or what torch's cast returns if the dtype has no infinity.

    Args:
        values: flat.
        dtype: a floating-point dtype.
        scratch: a float64 and a float32 buffer of at least as many elements, which are overwritten. Allocating them for
            each call costs half as much as the arithmetic.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    if scratch is None:
        scratch = torch.empty_like(values), torch.empty_like(values, dtype=torch.float32)
    odd = _round_to_odd_float32(values, *(buffer[: values.numel()] for buffer in scratch))
    # Subnormal float32 numbers have fewer bits. Of the narrower dtypes only bfloat16 has values there.
    if dtype == torch.bfloat16 and _has_subnormal(odd):
        odd = _round_to_odd_subnormal_float32(values)
    return odd.to(dtype)


def _round_to_odd_float32(values: torch.Tensor, wide: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
    """Returns float64 cut to normal float32, with the last bit set if anything was lost."""
    bits, odd = values.view(torch.int64), wide.view(torch.int64)
    # Adding carries a one into the last bit that is kept if and only if a lower bit is set.
    torch.bitwise_and(bits, _LOST, out=odd).add_(_LOST).bitwise_or_(bits).bitwise_and_(~_LOST)
    return single.copy_(wide)


def _has_subnormal(values: torch.Tensor) -> bool:
    if not values.numel():
        return False
    # Magnitudes as integers, minus one, so that zero becomes the largest.
    below = values.view(torch.int32).bitwise_and(0x7FFFFFFF).sub_(1).bitwise_and_(0x7FFFFFFF)
    return bool(below.amin() < 0x007FFFFF)


def _round_to_odd_subnormal_float32(values: torch.Tensor) -> torch.Tensor:
    """Returns the same as `_round_to_odd_float32`, for subnormal numbers too, in twice the time."""
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    inexact = back.ne(values)
    away_from_zero = back.abs() > values.abs()
    # Read as an integer, a float32 minus one is the next value towards zero, whatever the sign.
    bits = nearest.view(torch.int32)
    bits.sub_(away_from_zero.to(torch.int32)).bitwise_or_(inexact.to(torch.int32))
    return bits.view(torch.float32)
