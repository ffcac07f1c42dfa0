"""Which tensors have the same bytes in every checkpoint, before the mean.

Integers are copied only if they are equal, and so are masks. BatchNorm layers with equal running statistics are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream_bytes
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.mean.buffers import KINDS
from ckpt_avg.mean.plan import Plan
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
        checkpoints: open checkpoints that fit together.
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


def refuse_unequal(checkpoints: Sequence[Checkpoint], plan: Plan) -> None:
    """Raises IncompatibleError if tensors differ between the checkpoints that must be equal."""
    unequal = differing(checkpoints, (tensor.name for tensor in plan.tensors if tensor.rule == "equal"))
    problems = []
    for kind in KINDS:
        if found := [each for name, each in unequal.items() if plan.kinds[name] is kind]:
            are = f"{plural(len(found), kind.noun)} {'differs' if len(found) == 1 else 'differ'}"
            places = listing(map(str, found), separator="\n  ")
            problems.append(f"{are} in other checkpoints, and {kind.refusal}\n  {places}")
    if problems:
        where = one_line(str(checkpoints[0].spec.path))
        raise IncompatibleError(f"{where}: " + "\n".join(problems), lines=True)


def _first_difference(first: Checkpoint, other: Checkpoint, name: str) -> int | None:
    tensor = first.spec.tensors[name]
    if (tensor.dtype, tensor.shape) != (other.spec.tensors[name].dtype, other.spec.tensors[name].shape):
        return 0
    pairs = zip(stream_bytes(first, tensor), stream_bytes(other, other.spec.tensors[name]), strict=True)
    for (start, expected), (_, found) in pairs:
        if bytes(expected) != bytes(found):
            index = next(index for index, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
            return start + index // tensor.dtype.itemsize
    return None
