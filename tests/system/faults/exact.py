"""An exact oracle for means and casts: integers only, no float arithmetic.

A finite value of a float format is an integer multiple of its smallest subnormal. The codes of positive values, read
as integers, rise with the values, so the neighbours of any rational number are found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch


@dataclass(frozen=True)
class Format:
    """One binary float format.

    Attributes:
        bits, mantissa, bias: as its definition says.
        largest: the code of the largest finite value.
        infinity: the code of +Inf; None where there is none.
        negative_zero: whether there is one.
    """

    dtype: torch.dtype
    bits: int
    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    negative_zero: bool = True

    @property
    def unit(self) -> Fraction:
        """The smallest subnormal."""
        return Fraction(2) ** (1 - self.bias - self.mantissa)

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer dtype that codes are read as."""
        return {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[self.bits]

    def magnitude(self, code: int) -> int:
        """The value of a code without its sign bit, in units of the smallest subnormal."""
        exponent, fraction = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        return fraction if exponent == 0 else (fraction | 1 << self.mantissa) << (exponent - 1)

    def integers(self, values: torch.Tensor) -> np.ndarray:
        """Finite values as exact integers, in units of the smallest subnormal."""
        codes = self.codes(values)
        sign = 1 << (self.bits - 1)
        return np.array([-self.magnitude(code ^ sign) if code & sign else self.magnitude(code) for code in codes], "O")

    def codes(self, values: torch.Tensor) -> list[int]:
        """The bits of values, as unsigned integers."""
        assert values.dtype == self.dtype
        return [code & ((1 << self.bits) - 1) for code in values.contiguous().view(self.code_dtype).tolist()]

    def values(self, codes: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The values with these bits, given as unsigned integers."""
        unsigned = np.array(codes, dtype=np.uint64).astype(f"u{self.bits // 8}")
        return torch.from_numpy(unsigned.view(f"i{self.bits // 8}")).view(self.dtype)

    def nearest(self, numerator: int, denominator: int, *, negative_zero: bool = False) -> int:
        """The code nearest to a rational number of units, ties to even.

        Args:
            numerator, denominator: the number, in units of the smallest subnormal.
            negative_zero: the sign of the result where the number is zero.
        """
        negative = numerator < 0 or (numerator == 0 and negative_zero)
        size = abs(numerator)
        below, above = 0, self.largest + 1  # the value after the largest, had the format one more exponent
        while above - below > 1:
            middle = (below + above) // 2
            if self.magnitude(middle) * denominator <= size:
                below = middle
            else:
                above = middle
        twice, middle = 2 * size, (self.magnitude(below) + self.magnitude(above)) * denominator
        code = above if twice > middle or (twice == middle and below % 2) else below
        if code > self.largest:
            assert self.infinity is not None, "the number is out of the range of a format without infinities"
            code = self.infinity
        if negative and (code or self.negative_zero):
            code |= 1 << (self.bits - 1)
        return code

    def nearest_to(self, value: float) -> int:
        """The code nearest to a finite Python float."""
        number = Fraction(value) / self.unit
        return self.nearest(number.numerator, number.denominator, negative_zero=str(value)[0] == "-")


FLOAT64 = Format(torch.float64, 64, 52, 1023, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000)
FLOAT32 = Format(torch.float32, 32, 23, 127, 0x7F7F_FFFF, 0x7F80_0000)
BFLOAT16 = Format(torch.bfloat16, 16, 7, 127, 0x7F7F, 0x7F80)
FLOAT16 = Format(torch.float16, 16, 10, 15, 0x7BFF, 0x7C00)
E5M2 = Format(torch.float8_e5m2, 8, 2, 15, 0x7B, 0x7C)
E4M3FN = Format(torch.float8_e4m3fn, 8, 3, 7, 0x7E, None)
E5M2FNUZ = Format(torch.float8_e5m2fnuz, 8, 2, 16, 0x7F, None, negative_zero=False)
E4M3FNUZ = Format(torch.float8_e4m3fnuz, 8, 3, 8, 0x7F, None, negative_zero=False)
FLOAT8 = (E5M2, E4M3FN, E5M2FNUZ, E4M3FNUZ)


def exact_mean(inputs: list[torch.Tensor], source: Format, target: Format | None = None) -> list[int]:
    """The codes of the exact mean of finite tensors, rounded once to the target format."""
    target = target or source
    total = sum((source.integers(values.flatten()) for values in inputs[1:]), source.integers(inputs[0].flatten()))
    sign = 1 << (source.bits - 1)
    all_negative_zero = [
        all(code == sign for code in codes)
        for codes in zip(*(source.codes(values.flatten()) for values in inputs), strict=True)
    ]
    factor = source.unit / target.unit
    return [
        target.nearest(number * factor.numerator, len(inputs) * factor.denominator, negative_zero=zero)
        for number, zero in zip(total, all_negative_zero, strict=True)
    ]


def beyond_float64_error(codes: Sequence[int], inputs: Sequence[torch.Tensor], fmt: Format) -> int:
    """How many means are further from the exact ones than a float64 sum can be, followed by one correct rounding."""
    number, scale = len(inputs), 2**53  # the bound is number · 2⁻⁵³ · sum|x|
    wrong = 0
    for code, column in zip(codes, np.stack([fmt.integers(values) for values in inputs]).T, strict=True):
        total, slack = sum(column), number * sum(map(abs, column))
        low, high = (fmt.nearest(total * scale + side * slack, number * scale) for side in (-1, 1))
        wrong += not _ordered(low, fmt) <= _ordered(code, fmt) <= _ordered(high, fmt)
    return wrong


def _ordered(code: int, fmt: Format) -> int:
    sign = 1 << (fmt.bits - 1)
    return -(code ^ sign) if code & sign else code
