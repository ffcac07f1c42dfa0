"""Outputs held against the mean in exact arithmetic, and against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_CHUNK = 8 * 2**20  # elements
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True)
class Difference:
    """How far an output is from the mean.

    Attributes:
        elements: all of them.
        wrong: those that are not the mean, rounded to nearest.
        relative: the largest |output − mean| / |mean|.
    """

    elements: int
    wrong: int
    relative: float

    def __str__(self) -> str:
        if not self.wrong:
            return "exact"
        return f"{self.wrong / self.elements:.2g} of elements wrong, relative error to {self.relative:.1e}"


def difference(output: Path, inputs: Sequence[Path]) -> Difference:
    """Compares an output with the mean of safetensors checkpoints.

    The numbers here differ by less than 2²⁹ in magnitude, so float64 sums are exact.
    """
    elements = wrong = 0
    relative = 0.0
    with ExitStack() as stack:
        found = _open(output, stack)
        given = [_open(path, stack) for path in inputs]
        if any(each.keys() != found.keys() for each in given):
            raise AssertionError(f"{output}: not the tensors of the inputs")
        for name, file in found.items():
            part = file.get_slice(name)
            for rows in _rows(part.get_shape()):
                values = part[rows]
                mean = given[0][name].get_slice(name)[rows].double()
                for each in given[1:]:
                    mean += each[name].get_slice(name)[rows].double()
                mean /= len(given)
                elements += values.numel()
                wrong += _wrong(values, mean)
                error = (values.double() - mean).abs_().div_(mean.abs_().clamp_min_(1e-30))
                relative = max(relative, error.max().item())
    return Difference(elements, wrong, relative)


def _wrong(values: Tensor, mean: Tensor) -> int:
    """Counts what is not the nearest number of its dtype. torch rounds rightly to float32 alone."""
    bits = values.view(_BITS[values.dtype.itemsize])
    if values.dtype == torch.float32:
        return int((bits != mean.to(torch.float32).view(torch.int32)).sum())
    error = (values.double() - mean).abs_()
    nearer = torch.zeros_like(error, dtype=torch.bool)
    for step in (-1, 1):
        nearer |= ((bits + step).view(values.dtype).double() - mean).abs_() < error
    return int(nearer.sum())


def same(ours: Path, theirs: Path) -> bool:
    """Tells whether two outputs hold the same bits in every tensor."""
    with ExitStack() as stack:
        a, b = _open(ours, stack), _open(theirs, stack)
        return a.keys() == b.keys() and all(
            torch.equal(a[name].get_tensor(name).view(torch.uint8), b[name].get_tensor(name).view(torch.uint8))
            for name in a
        )


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Returns the open file of each tensor."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (it is no dict)


def _rows(shape: list[int]) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))
