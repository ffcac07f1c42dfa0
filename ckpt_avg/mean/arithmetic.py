"""The arithmetic of one element: a float64 sum in checkpoint order, one true division, one correct rounding.

torch casts float64 to the narrow dtypes through float32, and two roundings are not one: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1.0 in
bfloat16, but 1.0078125 is nearest. Rounding the first step to odd makes the second one correct (Boldo & Melquiond 2008,
"Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4)):
float32 has more than two bits beyond every narrower format, subnormals included.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

# Returns the values of one input, flat and real, on the device.
Values = Callable[[int], torch.Tensor]

# The NaN that is written, since which one an addition of two NaNs returns depends on the processor.
_NANS = {
    torch.float64: 0x7FF8000000000000,
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float8_e5m2: 0x7F,
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2fnuz: 0x80,
    torch.float8_e4m3fnuz: 0x80,
}
_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_OVERFLOW_E4M3FN = 464  # halfway from the largest value, 448, to what would be the next; itself rounded to 448
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
    numel = values(0).numel()
    total, wide, single = (buffer[:numel] for buffer in (total, wide, single))
    total.copy_(_widened(values(0), single))
    for index in range(1, number):
        total.add_(wide.copy_(_widened(values(index), single)))
    # The divisor is a tensor on the device: by a Python number, CUDA multiplies by the reciprocal.
    return total.div_(count)


def weighted_sum(
    values: Values, weights: Sequence[float], total: torch.Tensor, wide: torch.Tensor, single: torch.Tensor
) -> torch.Tensor:
    """Returns Σ weight · input in float64: each product is rounded, then added, in the order of the inputs.

    If a sum is not finite, but all inputs are equal, it is that value: −Inf in a mask, times weights of both signs,
    would be NaN.

    Args:
        values: returns an input.
        weights: of the inputs.
        total, wide, single: buffers as for `mean_of_narrower`; ``total`` contains the result.
    """
    numel = values(0).numel()
    total, wide, single = (buffer[:numel] for buffer in (total, wide, single))
    total.fill_(-0.0)  # neutral: -0.0 + -0.0 is -0.0
    for index, weight in enumerate(weights):
        # Two calls: in one, the product may not be rounded.
        wide.copy_(_widened(values(index), single)).mul_(weight)
        total.add_(wide)
    places = total.isfinite().logical_not_().nonzero().squeeze(1)
    if places.numel():
        # Widened first: torch before 2.11 cannot pick elements of float8.
        columns = torch.stack([values(index).to(torch.float64)[places] for index in range(len(weights))])
        bits = columns.view(torch.int64)
        total[places] = torch.where(bits.eq(bits[0]).all(dim=0), columns[0], total[places])
    return total


def _widened(values: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
    # Processors widen float16 in two steps; in one step, torch on the CPU converts element by element.
    return single.copy_(values) if values.dtype == torch.float16 else values


def mean_of_float64(values: Values, count: torch.Tensor, number: int, *, is_narrowed: bool = False) -> torch.Tensor:
    """Returns the exact means of float64 inputs, rounded once. Elements that are equal in all inputs are copied.

    The sum is kept in two numbers, and so is the quotient. What these lose is bounded, and where the bound leaves two
    numbers to round to, the mean is computed with fractions. (TwoSum: Knuth, The Art of Computer Programming, vol. 2,
    section 4.2.2, theorem B.)

    Args:
        values: returns an input.
        count: the number of inputs, as a float64 tensor on the device.
        number: the same as an int.
        is_narrowed: round to odd, for a caller who rounds the means again, to a narrower dtype.
    """
    first = values(0)
    high, low, lost = first, torch.zeros_like(first), torch.zeros_like(first)
    equal = torch.ones_like(first, dtype=torch.bool)
    for index in range(1, number):
        other = values(index)
        equal &= other.view(torch.int64).eq(first.view(torch.int64))
        high, rest = _two_sum(high, other)
        low, rest = _two_sum(low, rest)
        lost += rest.abs_()
    high, low = _two_sum(high, low)
    quotient = high / count
    rest, more = _two_sum(_remainder(high, quotient, count), low)
    correction = rest / count
    lost += more.abs_()
    inexact = lost.ne(0) | _remainder(rest, correction, count).ne(0)
    mean, left = _two_sum(quotient, correction)
    # Twice what was lost, and the rounding of the correction, covers the rounding of the bound itself.
    bound = torch.where(inexact, lost.div_(count).mul_(2) + correction.abs() * 2.0**-50, 0.0)
    unsure = (quotient + (correction + bound)).ne(quotient + (correction - bound))
    tiny = correction.abs().lt(2.0**-960).logical_and_(inexact)
    if is_narrowed:
        mean = _to_odd(mean, left, inexact | left.ne(0))
        unsure |= left.abs().le(bound).logical_and_(inexact)
    unsure.logical_or_(tiny).logical_or_(mean.isfinite().logical_not_()).logical_and_(equal.logical_not())
    if unsure.any():
        places = unsure.nonzero().squeeze(1)
        columns = torch.stack([values(index)[places].cpu() for index in range(number)], dim=1).tolist()
        means = [_exact_mean(column, is_narrowed=is_narrowed) for column in columns]
        mean[places] = torch.tensor(means, dtype=torch.float64, device=mean.device)
    return torch.where(equal, first, mean)


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rounded sum, and what rounding has lost."""
    total = a + b
    kept = total - a
    return total, (a - (total - kept)) + (b - kept)


def _remainder(dividend: torch.Tensor, quotient: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Returns dividend − quotient · count, exactly, for a quotient that was rounded, and at most 2²⁶ inputs."""
    upper = quotient.view(torch.int64).bitwise_and(~(2**27 - 1)).view(torch.float64)  # 26 bits of 53
    return (dividend - upper * count) - (quotient - upper) * count


def _to_odd(nearest: torch.Tensor, left: torch.Tensor, inexact: torch.Tensor) -> torch.Tensor:
    """Returns ``nearest + left`` cut to float64, with the last bit set where that is inexact."""
    beyond = left.ne(0) & left.signbit().ne(nearest.signbit())
    return (
        nearest.view(torch.int64).sub(beyond.to(torch.int64)).bitwise_or_(inexact.to(torch.int64)).view(torch.float64)
    )


def _exact_mean(column: Sequence[float], *, is_narrowed: bool) -> float:
    if not all(map(math.isfinite, column)):
        return sum(column) / len(column)
    exact = sum(map(Fraction, column), Fraction(0)) / len(column)
    mean = float(exact)
    if is_narrowed and mean != exact:
        towards_zero = abs(mean) > abs(exact)
        bits = struct.unpack("<q", struct.pack("<d", mean))[0] - towards_zero
        mean = struct.unpack("<d", struct.pack("<q", bits | 1))[0]
    return mean


def as_real(values: torch.Tensor) -> torch.Tensor:
    """Returns complex values as pairs of real ones, and real values unchanged."""
    return values.view(torch.float32) if values.dtype == torch.complex64 else values


def round_to(
    values: torch.Tensor, dtype: torch.dtype, scratch: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Returns float64 ``values`` in ``dtype``, each rounded once, to nearest, ties to even.

    A value out of the range of ``dtype`` becomes infinite, or NaN if the dtype has no infinity.

    Args:
        values: flat.
        dtype: a floating-point dtype.
        scratch: a float64 and a float32 buffer of at least as many elements, which are overwritten. Allocating them for
            each call costs half as much as the arithmetic.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    # Subnormal float32 numbers have fewer bits. Of the narrower dtypes only bfloat16 has values there. On CUDA, looking
    # for them would wait for the device.
    if dtype == torch.bfloat16 and values.is_cuda:
        return _round_to_odd_subnormal_float32(values).to(dtype)
    if scratch is None:
        scratch = torch.empty_like(values), torch.empty_like(values, dtype=torch.float32)
    odd = _round_to_odd_float32(values, *(buffer[: values.numel()] for buffer in scratch))
    if dtype == torch.bfloat16 and _has_subnormal(odd):
        odd = _round_to_odd_subnormal_float32(values)
    rounded = odd.to(dtype)
    if dtype == torch.float8_e4m3fn:  # torch's cast returns the largest value instead; the next code is NaN
        rounded.view(torch.uint8).bitwise_or_(odd.abs().gt(_OVERFLOW_E4M3FN).to(torch.uint8))
    return rounded


def write_nans(values: torch.Tensor, rounded: torch.Tensor) -> None:
    """Gives each NaN of ``values`` the one code in ``rounded`` that NaN has there."""
    rounded.view(_CODES[rounded.element_size()]).masked_fill_(values.isnan(), _NANS[rounded.dtype])


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
