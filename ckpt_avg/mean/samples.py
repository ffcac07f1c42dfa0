"""A sample of the weights of every checkpoint, and which checkpoints it shows to be far off. Nothing here needs torch.

The same few elements are read of each checkpoint, so their norms and cosines compare as those of all weights would, to
a few percent. `compare` measures all of them.
"""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from operator import mul

from ckpt_avg.checkpoint.spec import Checkpoint, TensorSpec
from ckpt_avg.checkpoint.tensor_reads import Ranges, read_bytes
from ckpt_avg.mean.far_off import UNRELATED
from ckpt_avg.mean.plan import Plan

NORM = 3.0  # of a checkpoint to the median, or the reverse
_PLACES = 16
_ELEMENTS = 128  # at each place
_CODES = {"float64": "d", "float32": "f", "float16": "e", "bfloat16": "H"}

Place = tuple[str, int, int]  # tensor, first element, element after the last


def far_off_by_sample(checkpoints: Sequence[Checkpoint], plan: Plan) -> Iterator[tuple[int, str]]:
    """Yields the index of each checkpoint that is far off, and what is: its norm, or its direction."""
    places = _places(checkpoints, plan)
    if len(checkpoints) < 2 or not places:
        return
    samples = [_sample(checkpoint, places) for checkpoint in checkpoints]
    norms = [math.sqrt(_product(sample, sample)) for sample in samples]
    middle = sorted(norms)[len(norms) // 2]
    if not middle or not all(map(math.isfinite, norms)):  # NaN and Inf are found in the mean
        return
    total = [sum(column) for column in zip(*samples, strict=True)]
    for index, (sample, norm) in enumerate(zip(samples, norms, strict=True)):
        if not 1 / NORM < norm / middle < NORM:
            yield index, f"the norm of its weights is about {norm / middle:.2g} times that of the other checkpoints"
            continue
        others = [a - b for a, b in zip(total, sample, strict=True)]
        length = math.sqrt(_product(others, others))
        cosine = _product(sample, others) / (norm * length) if length else 1.0
        if cosine < UNRELATED and (len(samples) > 2 or index):
            yield index, f"its weights have nothing in common with those of the others (cosine about {cosine:.2f})"


def _places(checkpoints: Sequence[Checkpoint], plan: Plan) -> list[Place]:
    """Returns places that are evenly spread over the matrices; none if these have few elements."""
    tables = {id(table): table for table in (checkpoint.spec.tensors for checkpoint in checkpoints)}.values()
    matrices = [
        (each.name, each.numel)
        for each in plan.tensors
        if len(each.shape) > 1 and sum(extent > 1 for extent in each.shape) > 1 and each.rule == "mean"
        and each.name not in plan.kinds and all(_is_simple(table[each.name]) for table in tables)
    ]  # fmt: skip
    ends = list(itertools.accumulate(numel for _, numel in matrices))
    if not ends or ends[-1] < _PLACES * _ELEMENTS:
        return []
    places = []
    for number in range(_PLACES):
        position = ends[-1] * number // _PLACES
        index = bisect.bisect_right(ends, position)
        name, numel = matrices[index]
        start = position - (ends[index] - numel)
        places.append((name, start, min(numel, start + _ELEMENTS)))
    return places


def _is_simple(tensor: TensorSpec) -> bool:
    """Whether a few elements can be read and decoded at once."""
    return tensor.dtype.torch_name in _CODES and tensor.is_contiguous


def _sample(checkpoint: Checkpoint, places: Sequence[Place]) -> list[float]:
    values: list[float] = []
    for name, start, stop in places:
        tensor = checkpoint.spec.tensors[name]
        contents = read_bytes(checkpoint, Ranges([(tensor, start, stop)]))
        found = struct.unpack(f"<{stop - start}{_CODES[tensor.dtype.torch_name]}", contents)
        if tensor.dtype.torch_name == "bfloat16":  # the upper half of a float32
            found = struct.unpack(f"<{len(found)}f", struct.pack(f"<{len(found)}I", *(each << 16 for each in found)))
        values += found
    return values


def _product(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))
