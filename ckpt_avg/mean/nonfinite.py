"""The messages for NaN and Inf in the inputs, and for means out of range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.errors import NonFiniteError
from ckpt_avg.mean.equal_tensors import differing
from ckpt_avg.mean.plan import OutputTensor
from ckpt_avg.text import listing, one_line, quote


class Constants:
    """The tensors that are the same in several checkpoints, such as attention masks: these may contain infinities."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        if name not in self._known:
            self._known[name] = len(self._checkpoints) > 1 and not differing(self._checkpoints, [name])
        return self._known[name]


def refuse_nonfinite(
    checkpoints: Sequence[Checkpoint], tensor: OutputTensor, count: Callable[[Checkpoint, str], tuple[int, int]]
) -> NoReturn:
    """Raises NonFiniteError with the checkpoints that have NaN or Inf in a tensor, how many and where.

    If none has, a weighted sum of finite values has overflowed.

    Args:
        checkpoints: those in the mean.
        tensor: the tensor.
        count: returns how many elements of a checkpoint's tensor are NaN or Inf, and the index of the first.
    """
    found: list[str] = []
    for checkpoint in checkpoints:
        number, first = count(checkpoint, tensor.name)
        if number:
            found.append(
                f"{one_line(str(checkpoint.spec.path))}: {number:,} of {tensor.numel:,} elements, the first at index "
                f"{first:,}"
            )
    if not found:
        raise NonFiniteError(
            f"tensor {quote(tensor.name)}: all values are finite, but their sum with these weights is out of the range "
            "of float64. Use weights closer to zero."
        )
    raise NonFiniteError(
        f"tensor {quote(tensor.name)}: NaN or Inf in these checkpoints:\n  "
        + listing(found, separator="\n  ")
        + "\nSkip them with --exclude, or accept NaN and Inf with --allow-nonfinite.",
        lines=True,
    )


def out_of_range(tensor: OutputTensor, index: int, value: float) -> NonFiniteError:
    """Returns the error for a mean that the output dtype cannot hold."""
    return NonFiniteError(
        f"tensor {quote(tensor.name)}: the mean {value:g} at index {index:,} is out of the range of "
        f"{tensor.dtype.torch_name}. Choose a wider --dtype."
    )
