"""NaN, Inf and overflow: found while averaging, then named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.errors import NonFiniteError
from ckpt_avg.mean.plan import OutputTensor
from ckpt_avg.text import listing, one_line, quote


def describe_nonfinite(checkpoints: Sequence[Checkpoint], tensor: OutputTensor) -> str:
    """Looks through one tensor of every checkpoint for NaN and Inf."""
    found: list[str] = []
    for checkpoint in checkpoints:
        count, first = 0, -1
        for start, values in stream(checkpoint, checkpoint.spec.tensors[tensor.name]):
            bad = values.to(torch.complex128 if values.is_complex() else torch.float64).isfinite().logical_not_()
            if bad.any():
                first = start + int(bad.to(torch.uint8).argmax()) if first < 0 else first
                count += int(bad.sum())
        if count:
            found.append(
                f"{one_line(str(checkpoint.spec.path))}: {count:,} of {tensor.numel:,} elements, the first at index "
                f"{first:,}"
            )
    return (
        f"tensor {quote(tensor.name)}: expected finite numbers, got NaN or Inf:\n  "
        + listing(found, separator="\n  ")
        + "\nLeave such checkpoints out with --exclude, or let NaN and Inf through with --allow-nonfinite."
    )


def refuse_overflow(
    locate: Callable[[int], tuple[OutputTensor, int]], mean: torch.Tensor, rounded: torch.Tensor
) -> None:
    """Raises NonFiniteError where a finite mean has become infinite in the output dtype.

    Args:
        locate: returns the tensor that one of these elements belongs to, and its index there.
        mean, rounded: before and after the cast.
    """
    overflowed = rounded.isfinite().logical_not_().logical_and_(mean.isfinite())
    if overflowed.any():
        index = int(overflowed.to(torch.uint8).argmax())
        tensor, place = locate(index)
        raise NonFiniteError(
            f"tensor {quote(tensor.name)}: expected a mean within the range of {tensor.dtype.torch_name}, got "
            f"{mean[index].item():g} at index {place:,}. Choose a wider --dtype."
        )
