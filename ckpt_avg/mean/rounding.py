"""One correct rounding from float64 to any floating-point dtype.

torch casts float64 to the narrow dtypes by way of float32, and two roundings are not one: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1.0 in
bfloat16, where 1.0078125 is nearest. Rounding the first step to odd makes the second one right (Boldo & Melquiond 2008,
"Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4)):
float32 has more than two bits beyond every narrower format, subnormals included.
"""

from __future__ import annotations

import torch

_LOST = 2**29 - 1  # the bits of a float64 that a float32 has no room for


def round_to(
    values: torch.Tensor, dtype: torch.dtype, scratch: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Returns float64 ``values`` in ``dtype``, each rounded once, to nearest, ties to even.

    A value beyond the range of ``dtype`` becomes infinite, or what torch makes of it where the dtype has no infinity.

    Args:
        values: flat.
        dtype: a floating-point dtype.
        scratch: a float64 and a float32 buffer of at least as many elements, which are overwritten. Fresh memory has to
            be brought in page by page, at half the cost of the arithmetic.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    if scratch is None:
        scratch = torch.empty_like(values), torch.empty_like(values, dtype=torch.float32)
    odd = _round_to_odd_float32(values, *(buffer[: values.numel()] for buffer in scratch))
    # Where float32 itself is subnormal it has fewer bits. bfloat16 alone has values there.
    if dtype == torch.bfloat16 and _has_subnormal(odd):
        odd = _round_to_odd_subnormal_float32(values)
    return odd.to(dtype)


def _round_to_odd_float32(values: torch.Tensor, wide: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
    """Returns what float32 has room for, and its last bit set where anything was lost; for normal float32 numbers."""
    bits, odd = values.view(torch.int64), wide.view(torch.int64)
    # Adding carries a one into the last bit that is kept if and only if there is a one below it.
    torch.bitwise_and(bits, _LOST, out=odd).add_(_LOST).bitwise_or_(bits).bitwise_and_(~_LOST)
    return single.copy_(wide)


def _has_subnormal(values: torch.Tensor) -> bool:
    if not values.numel():
        return False
    # Magnitudes as integers, less one, so that zero becomes the largest of all.
    below = values.view(torch.int32).bitwise_and(0x7FFFFFFF).sub_(1).bitwise_and_(0x7FFFFFFF)
    return bool(below.amin() < 0x007FFFFF)


def _round_to_odd_subnormal_float32(values: torch.Tensor) -> torch.Tensor:
    """The same for all numbers, at twice the time."""
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    inexact = back.ne(values)
    away_from_zero = back.abs() > values.abs()
    # The bits of a float32 read as an integer: one less is the next value towards zero, whatever the sign.
    bits = nearest.view(torch.int32)
    bits.sub_(away_from_zero.to(torch.int32)).bitwise_or_(inexact.to(torch.int32))
    return bits.view(torch.float32)
