"""Checkpoints to average: of every dtype and magnitude, with ties, with arbitrary bits. All values are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from system.faults.exact import FLOAT16, Format

State = Mapping[str, torch.Tensor]


def save(folder: Path, states: Sequence[State], suffix: str = ".safetensors") -> list[Path]:
    """Saves states as checkpoints 0, 1, 2, …"""
    paths = []
    for index, state in enumerate(states):
        paths.append(folder / f"{index}{suffix}")
        if suffix == ".safetensors":
            save_file(dict(state), paths[-1])
        else:
            torch.save(dict(state), paths[-1])
    return paths


def bits(values: torch.Tensor) -> bytes:
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- States ---------------------------------------------------------------------------------------------------------


def mixed_run(number: int = 3) -> list[dict[str, torch.Tensor]]:
    """Tensors of many dtypes and sizes: single elements, and more than fits in any block of 1 MiB of memory."""
    states = []
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        state = {
            "big": torch.randn(300, 701, generator=generator),
            "half": torch.randn(90_001, generator=generator).half(),
            "brain": torch.randn(70_003, generator=generator).bfloat16(),
            "double": torch.randn(60_007, generator=generator, dtype=torch.float64),
            "complex": torch.randn(20_011, generator=generator, dtype=torch.complex64),
            "float8": torch.randn(30_011, generator=generator).to(torch.float8_e5m2),
            "codes": torch.arange(40_009) % 251,
            "empty": torch.empty(3, 0),
        }
        state |= {f"small.{i}": torch.randn(i % 5, generator=generator) for i in range(300)}
        states.append(state)
    return states


def every_dtype(number: int, elements: int) -> list[dict[str, torch.Tensor]]:
    """Tensors of every averaged dtype, over many magnitudes, none of which shares memory with another."""
    float8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    states = []
    for index in range(number):
        values = many_magnitudes(elements, range(-30, 8), seed=index)
        state = {
            str(dtype): values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, *float8)
        }
        state["complex64"] = torch.complex(values.float(), values.flip(0).float())
        state |= {"integers": torch.arange(1000), "scalar": values[0].clone()}
        states.append(state)
    return states


def many_magnitudes(elements: int, exponents: range, *, seed: int) -> torch.Tensor:
    """Normally distributed float64 values, each times a random power of two."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(exponents.start, exponents.stop, (elements,), generator=generator)
    return torch.randn(elements, generator=generator, dtype=torch.float64) * torch.exp2(powers.double())


# -- Values of one format -------------------------------------------------------------------------------------------


def _floor(values: np.ndarray, mantissa: int) -> np.ndarray:
    quantum = 2.0 ** (np.floor(np.log2(np.abs(values))) - mantissa)
    return np.floor(values / quantum) * quantum


def ties(number: int, fmt: Format, count: int, rng: np.random.Generator) -> np.ndarray:
    """Inputs whose mean is a midpoint of the format, or differs from it by less than float32 can show."""
    ulp = 2.0**-fmt.mantissa
    middle = (1 + (rng.integers(0, 2**fmt.mantissa, count) + 0.5) * ulp) * 2.0 ** rng.integers(0, 4, count)
    inputs = np.zeros((number, count))
    inputs[0] = _floor(number * middle, fmt.mantissa)
    inputs[1] = number * middle - inputs[0]
    if number > 2:
        little = 2.0**-24 if fmt is FLOAT16 else 2.0**-40
        inputs[2] = rng.choice([-little, 0, little], count)
    return rng.permuted(inputs, axis=0) * rng.choice([-1, 1], count)


def awkward_inputs(number: int, fmt: Format, count: int = 600) -> list[torch.Tensor]:
    """Inputs of every kind, whose sums are exact: those of one element have at most 53 bits together."""
    rng = np.random.default_rng(number)
    size = (number, count)
    signs = rng.choice([-1.0, 1.0], size)
    lowest, highest = 1 - fmt.bias - fmt.mantissa, fmt.bias
    significand = 1 + rng.integers(0, 2**fmt.mantissa, size) * 2.0**-fmt.mantissa
    exponents = rng.integers(lowest + 8, highest - 8, count) + rng.integers(-8, 9, size)
    kinds = {
        "any exponent": signs * np.ldexp(significand, exponents),
        "neighbours of one": 1 + rng.integers(0, 8, size) * 2.0**-fmt.mantissa,
        "ties": ties(number, fmt, count, rng),
        "subnormal": signs * rng.integers(0, 2**fmt.mantissa, size) * float(fmt.unit),
        "huge": signs * np.ldexp(significand, highest),
        "zeros": signs * np.where(rng.random(size) < 0.9, 0.0, float(fmt.unit)),
        "one sign": np.ldexp(significand, rng.integers(-4, 4, size)),
    }
    matrix = torch.from_numpy(np.concatenate(list(kinds.values()), axis=1))
    # Exponents near the bottom make some values no multiple of the smallest subnormal: those are cast.
    return [row.to(torch.float32).to(fmt.dtype) for row in matrix]


def any_bits(fmt: Format, number: int, count: int, seed: int) -> list[torch.Tensor]:
    """Finite values of any sign, exponent and mantissa."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, fmt.largest + 1, (number, count)) | rng.integers(0, 2, (number, count)) << (fmt.bits - 1)
    if not fmt.negative_zero:
        codes[codes == 1 << (fmt.bits - 1)] = 0  # the code of NaN
    return [fmt.values(row) for row in codes]
