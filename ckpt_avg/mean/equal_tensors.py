"""Finds the tensors that have the same bytes in every checkpoint, before the mean.

Integer and bool tensors are copied only if they are equal. BatchNorm layers with equal running statistics are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.text import listing, one_line, plural, quote


@dataclass(frozen=True, slots=True)
class Unequal:
    """The first element of a tensor that differs from the first checkpoint's."""

    tensor: str
    checkpoint: str
    index: int

    def __str__(self) -> str:
        return f"tensor {quote(self.tensor)}: first at index {self.index:,} in {one_line(self.checkpoint)}"


def differing(checkpoints: Sequence[Checkpoint], names: Iterable[str]) -> dict[str, Unequal]:
    """Compares tensors bit by bit with the first checkpoint's; returns those that differ, with the first difference.

    Args:
        checkpoints: open checkpoints with the same names, shapes and dtypes.
        names: the tensors to compare.
    """
    found: dict[str, Unequal] = {}
    for name in names:
        for other in checkpoints[1:]:
            index = _first_difference(checkpoints[0], other, name)
            if index is not None:
                found[name] = Unequal(name, str(other.spec.path), index)
                break
    return found


def refuse_unequal(checkpoints: Sequence[Checkpoint], names: Iterable[str]) -> None:
    """Raises IncompatibleError if integer or bool tensors differ between the checkpoints."""
    unequal = differing(checkpoints, names)
    if unequal:
        raise IncompatibleError(
            f"{one_line(str(checkpoints[0].spec.path))}: {plural(len(unequal), 'integer or bool tensor')} "
            f"{'differs' if len(unequal) == 1 else 'differ'} in other checkpoints, and these dtypes are never averaged:"
            f"\n  {listing(map(str, unequal.values()), separator=chr(10) + '  ')}\n"
            "Use --non-float last to copy the last checkpoint's.",
            lines=True,
        )


def _first_difference(first: Checkpoint, other: Checkpoint, name: str) -> int | None:
    pairs = zip(stream(first, first.spec.tensors[name]), stream(other, other.spec.tensors[name]), strict=True)
    for (start, expected), (_, found) in pairs:
        unequal = expected.view(torch.uint8).ne(found.view(torch.uint8))
        if unequal.any():
            return start + int(unequal.to(torch.uint8).argmax()) // expected.element_size()
    return None
