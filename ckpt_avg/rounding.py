"""One correctly rounded cast from float64 to any float dtype.

torch casts float64 to bfloat16 and float16 by way of float32, which rounds twice: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1.0 where
1.0078125 is nearer. Rounding the first step to odd makes the second one right (Boldo & Melquiond 2008, "Emulation of
a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4)): float32
has more than two bits beyond every narrower format, subnormals included.
"""

from __future__ import annotations

import torch


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns float64 ``values`` in ``dtype``, each rounded once, to nearest, ties to even.

    A value beyond the range of ``dtype`` becomes infinite, or what torch makes of it where the dtype has no infinity.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    return _round_to_odd_float32(values).to(dtype)


def _round_to_odd_float32(values: torch.Tensor) -> torch.Tensor:
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    inexact = back.ne(values)
    away_from_zero = back.abs() > values.abs()
    # The bits of a float32 read as an integer: one less is the next value towards zero, whatever the sign.
    bits = nearest.view(torch.int32)
    bits.sub_(away_from_zero.to(torch.int32)).bitwise_or_(inexact.to(torch.int32))
    return bits.view(torch.float32)
