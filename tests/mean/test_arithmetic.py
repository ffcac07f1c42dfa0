"""The cast from float64 by either engine, against exact integer arithmetic."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from system.faults.exact import BFLOAT16, E5M2, FLOAT8, FLOAT16, FLOAT32, Format

from ckpt_avg.mean.arithmetic import _round_to_odd_subnormal_float32 as round_to_odd
from ckpt_avg.mean.arithmetic import round_to

FORMATS = (FLOAT32, BFLOAT16, FLOAT16, *FLOAT8)
WITH_INFINITY = (FLOAT32, BFLOAT16, FLOAT16, E5M2)
all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: str(fmt.dtype).removeprefix("torch."))


Cast = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


def round_natively(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The native engine's cast: the mean of one float64 input."""
    kernel = pytest.importorskip("ckpt_avg._kernel", reason="the native engine was not built here")
    contents = bytearray(values.numpy().tobytes())
    row = struct.pack("5q", kernel.MEMORY, -1, 0, kernel.DTYPES["float64"], 0).ljust(kernel.ROW, b"\0")
    output = bytearray(max(1, values.numel() * dtype.itemsize))
    code = kernel.DTYPES[str(dtype).removeprefix("torch.")]
    kernel.mean(bytearray(row), b"", contents, max(8, len(contents)), values.numel(), code, output, 0)
    return torch.frombuffer(output, dtype=dtype, count=values.numel())


each_engine = pytest.mark.parametrize("cast", [round_to, round_natively])


def codes_of(cast: Cast, values: list[float], fmt: Format) -> list[int]:
    return fmt.codes(cast(torch.tensor(values, dtype=torch.float64), fmt.dtype))


def neighbours(fmt: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of positive finite values, those values, and the next values; of float32 a sample with all the edges."""
    if fmt.bits == 32:
        random = np.random.default_rng(0).integers(0, fmt.largest, 100_000)
        edges = [*range(200), *range(0x0080_0000 - 200, 0x0080_0000 + 200), *range(fmt.largest - 200, fmt.largest)]
        codes = np.unique(np.concatenate([random, edges]))
    else:
        codes = np.arange(fmt.largest)
    unit = float(fmt.unit)
    lower = np.array([float(fmt.magnitude(int(code))) * unit for code in codes])
    upper = np.array([float(fmt.magnitude(int(code) + 1)) * unit for code in codes])
    return codes, lower, upper


@each_engine
@all_formats
@pytest.mark.parametrize("sign", [1, -1])
def test_every_midpoint_and_its_float64_neighbours_are_rounded_to_nearest_even(
    cast: Cast, fmt: Format, sign: int
) -> None:
    codes, lower, upper = neighbours(fmt)
    middle = (lower + upper) / 2  # exact: a midpoint has one bit more than the format
    grid = {
        "the value itself": (lower, codes),
        "just above it": (np.nextafter(lower, np.inf), codes),
        "just below the next": (np.nextafter(upper, -np.inf), codes + 1),
        "just below the midpoint": (np.nextafter(middle, -np.inf), codes),
        "the midpoint": (middle, codes + codes % 2),
        "just above the midpoint": (np.nextafter(middle, np.inf), codes + 1),
        # What float32 cannot tell from the midpoint.
        "2^-40 below": (middle - middle * 2.0**-40, codes),
        "2^-40 above": (middle + middle * 2.0**-40, codes + 1),
    }
    for place, (values, expected) in grid.items():
        rounded = cast(torch.from_numpy(sign * values), fmt.dtype)
        bit = 0 if sign > 0 else 1 << (fmt.bits - 1)
        signed = np.where((expected == 0) & (not fmt.negative_zero), 0, expected | bit)
        wrong = np.flatnonzero(np.array(fmt.codes(rounded)) != signed)
        assert not wrong.size, f"{place}: {wrong.size} wrong, the first of {sign * values[wrong[0]]!r}"


@each_engine
@all_formats
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
@settings(max_examples=40, deadline=None)
def test_any_float64_is_rounded_as_exact_arithmetic_says(cast: Cast, fmt: Format, values: list[float]) -> None:
    if fmt.infinity is None:
        largest = fmt.magnitude(fmt.largest) * float(fmt.unit)
        values = [math.fmod(value, largest) for value in values]
    assert codes_of(cast, values, fmt) == [fmt.nearest_to(value) for value in values]


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, E5M2], ids=lambda fmt: str(fmt.dtype))
def test_the_grid_catches_a_cast_that_rounds_twice(fmt: Format) -> None:
    """A control of the tests above: the cast by way of float32 fails on the values they use."""
    codes, lower, upper = neighbours(fmt)
    middle = (lower + upper) / 2
    twice = torch.from_numpy(np.nextafter(middle, np.inf)).to(torch.float32).to(fmt.dtype)
    assert (np.array(fmt.codes(twice)) != codes + 1).any()


@each_engine
@pytest.mark.guarantee("extreme-values")
@all_formats
def test_zeros_keep_their_sign_and_underflow_keeps_it_too(cast: Cast, fmt: Format) -> None:
    negative = 1 << (fmt.bits - 1) if fmt.negative_zero else 0
    assert codes_of(cast, [0.0, -0.0, 5e-324, -5e-324, 1e-60, -1e-60], fmt) == [0, negative] * 3


@each_engine
@pytest.mark.parametrize("fmt", WITH_INFINITY, ids=lambda fmt: str(fmt.dtype))
def test_overflow_begins_halfway_past_the_largest_value(cast: Cast, fmt: Format) -> None:
    largest = fmt.magnitude(fmt.largest) * float(fmt.unit)
    threshold = (fmt.magnitude(fmt.largest) + fmt.magnitude(fmt.largest + 1)) * float(fmt.unit) / 2
    below = math.nextafter(threshold, 0)
    rounded = cast(
        torch.tensor([below, -below, threshold, -threshold, 1e308, math.inf, -math.inf], dtype=torch.float64), fmt.dtype
    )
    infinity = math.inf
    assert rounded.double().tolist() == [
        largest, -largest, infinity, -infinity, infinity, infinity, -infinity
    ]  # fmt: skip


@each_engine
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.infinity is None], ids=lambda fmt: str(fmt.dtype))
def test_overflow_is_nan_where_there_is_no_infinity(cast: Cast, fmt: Format) -> None:
    """Casts that return the largest value instead would hide it."""
    largest = fmt.magnitude(fmt.largest) * float(fmt.unit)
    threshold = (fmt.magnitude(fmt.largest) + fmt.magnitude(fmt.largest + 1)) * float(fmt.unit) / 2
    inside, outside = math.nextafter(threshold, 0), math.nextafter(threshold, math.inf)
    rounded = cast(torch.tensor([inside, -inside, outside, -outside, 1e308, math.inf], dtype=torch.float64), fmt.dtype)
    assert rounded[:2].double().tolist() == [largest, -largest]
    assert rounded[2:].double().isnan().all()


@each_engine
@all_formats
def test_nan_stays_nan(cast: Cast, fmt: Format) -> None:
    values = torch.tensor([math.nan, -math.nan, 1.0], dtype=torch.float64)
    assert cast(values, fmt.dtype).double().isnan().tolist() == [True, True, False]


def test_float64_is_returned_bit_for_bit() -> None:
    values = torch.tensor([0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf], dtype=torch.float64)
    assert round_to(values, torch.float64).view(torch.int64).equal(values.view(torch.int64))


def test_the_argument_is_not_changed() -> None:
    values = torch.tensor([1 + 2.0**-8 + 2.0**-40, -0.3, 1e300], dtype=torch.float64)
    before = values.clone()
    for fmt in FORMATS:
        round_to(values, fmt.dtype)
    assert values.equal(before)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda fmt: str(fmt.dtype))
@pytest.mark.parametrize("size", [0, 1, 127, 128, 1023, 1024, 5000, 70_001])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-40, 3e4])
def test_a_midpoint_is_rounded_to_even_at_any_position(fmt: Format, size: int, scale: float) -> None:
    """The short way for normal numbers and the long one for subnormal numbers both round once."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, dtype=torch.float64, generator=generator) * scale
    codes = torch.randint(1, fmt.largest - 1, (size,), generator=generator).tolist()
    chosen = torch.rand(size, generator=generator) < 0.002
    for index in {*chosen.nonzero().flatten().tolist(), *([0, size - 1] if size else [])}:
        middle = (fmt.magnitude(codes[index]) + fmt.magnitude(codes[index] + 1)) * float(fmt.unit) / 2
        values[index] = middle * (1 + 2.0**-45)
    if size > 5:
        values[size // 2] = math.nan  # next to a NaN, too
    expected = round_to_odd(values).to(fmt.dtype)
    found = round_to(values, fmt.dtype)
    assert found.isnan().equal(expected.isnan())
    assert found.nan_to_num(7.0).view(torch.int16).equal(expected.nan_to_num(7.0).view(torch.int16))
    assert round_to(values.view(-1, 1), fmt.dtype).shape == (size, 1)
