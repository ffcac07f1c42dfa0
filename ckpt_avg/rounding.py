"""One correct rounding from float64 to any floating-point dtype.

torch casts float64 to the narrow dtypes by way of float32, and two roundings are not one: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes 1.0 in
bfloat16, where 1.0078125 is nearest. If the first step rounds to odd instead (Boldo & Melquiond 2008, "Emulation of a
FMA and correctly rounded sums: proved algorithms using rounding to odd"), the second gives the correct result.

That costs several passes, and the two differ only where the nearest float32 lies halfway between two values of the
narrow dtype. So only the rows of elements in which that happens are rounded to odd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Narrow:
    """What a dtype has no room for.

    Attributes:
        lost: a float32's bits beyond it.
        halfway: these bits where a value is halfway between two of the dtype.
        least: below it the dtype is subnormal, and the halfway points are others.
        row: so many elements that few rows have one halfway.
    """

    lost: int
    halfway: int
    least: float
    row: int


_NARROW = {
    torch.bfloat16: _Narrow(0xFFFF, 0x8000, 0.0, 1024),
    torch.float16: _Narrow(0x1FFF, 0x1000, 2.0**-14, 128),
}


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns float64 ``values`` in ``dtype``, each rounded once, to nearest, ties to even.

    A value beyond the range of ``dtype`` becomes infinite, or what torch makes of it where the dtype has no infinity.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    if dtype not in _NARROW:
        return _round_to_odd_float32(values).to(dtype)
    narrow = _NARROW[dtype]
    flat = values.reshape(-1)
    nearest = flat.to(torch.float32)
    whole = flat.numel() - flat.numel() % narrow.row
    rows = nearest[:whole].view(-1, narrow.row)
    if whole:
        doubtful = rows.view(torch.int32).bitwise_and(narrow.lost).bitwise_xor_(narrow.halfway).amin(1) == 0
        if narrow.least:
            doubtful |= rows.abs().amin(1) < narrow.least
        if doubtful.any():
            where = doubtful.nonzero().squeeze(1)
            rows[where] = _round_to_odd_float32(flat[:whole].view(-1, narrow.row)[where])
    if whole < flat.numel():
        nearest[whole:] = _round_to_odd_float32(flat[whole:])
    return nearest.to(dtype).view(values.shape)


def _round_to_odd_float32(values: torch.Tensor) -> torch.Tensor:
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    inexact = back.ne(values)
    away_from_zero = back.abs() > values.abs()
    # The bits of a float32 read as an integer: one less is the next value towards zero, whatever the sign.
    bits = nearest.view(torch.int32)
    bits.sub_(away_from_zero.to(torch.int32)).bitwise_or_(inexact.to(torch.int32))
    return bits.view(torch.float32)
