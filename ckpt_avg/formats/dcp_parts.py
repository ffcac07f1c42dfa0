"""Combines the parts of a tensor, which are boxes stored separately, into one `TensorSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckpt_avg.checkpoint.spec import DType, Part, TensorSpec, contiguous_stride
from ckpt_avg.errors import fail
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote


def combine_parts(name: str, dtype: DType, shape: tuple[int, ...], parts: Sequence[Part], where: str) -> TensorSpec:
    """Returns a tensor that is stored in parts; of equal parts (replicas) the last is used.

    Raises:
        CheckpointFormatError: the parts do not cover each element exactly once.
    """
    boxes = list({(part.starts, part.tensor.shape): part for part in parts if part.tensor.numel}.values())
    for part in boxes:
        ends = [start + extent for start, extent in zip(part.starts, part.tensor.shape, strict=False)]
        outside = len(part.starts) != len(shape) or len(part.tensor.shape) != len(shape)
        if outside or min(part.starts, default=0) < 0 or any(a > b for a, b in zip(ends, shape, strict=True)):
            got = f"one of shape {quote(part.tensor.shape)} at {quote(part.starts)}"
            fail(where, f"expected parts inside the shape {quote(shape)}, got {got}")
    whole = TensorSpec(name, dtype, shape, contiguous_stride(shape), 0, 0, (0, 0))
    stored = sum(part.tensor.numel for part in boxes)
    if stored != whole.numel or _overlap(boxes, where):
        got = f"{len(boxes):,} parts with {stored:,} elements"
        advice = "A shard may be missing: save or copy the checkpoint again"
        fail(where, f"expected each of {whole.numel:,} elements in exactly one part, got {got}", advice)
    if len(boxes) == 1:
        return replace(boxes[0].tensor, name=name)
    boxes.sort(key=lambda part: part.starts)
    return replace(whole, parts=tuple(boxes))


def _overlap(boxes: Sequence[Part], where: str) -> bool:
    """Whether two boxes share an element: along a sorted dimension only neighbours can."""
    if len(boxes) < 2:
        return False
    rank = len(boxes[0].starts)
    along = max(range(rank), key=lambda axis: len({part.starts[axis] for part in boxes}), default=0)
    ordered = sorted(boxes, key=lambda part: part.starts[along])
    compared = 0
    for index, part in enumerate(ordered):
        end = part.starts[along] + part.tensor.shape[along]
        for other in ordered[index + 1 :]:
            if other.starts[along] >= end:
                break
            compared += 1
            if compared > LIMITS.part_pairs:
                fail(where, f"expected at most {LIMITS.part_pairs:,} neighbouring parts", "Save it in fewer")
            if all(
                part.starts[axis] < other.starts[axis] + other.tensor.shape[axis]
                and other.starts[axis] < part.starts[axis] + part.tensor.shape[axis]
                for axis in range(rank)
            ):
                return True
    return False
