"""The plan of open checkpoints, with the kinds of tensors that only values show: masks, and vectors of length 1."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from operator import attrgetter

from ckpt_avg.checkpoint.spec import Checkpoint, DType
from ckpt_avg.checkpoint.tensor_reads import Ranges, read_bytes, read_ranges, stream_bytes
from ckpt_avg.mean.plan import Plan, make_plan
from ckpt_avg.mean.recognisers import SpectralNorm, possible_spectral_norms

_SAMPLES = 256  # elements that show whether a tensor may contain both zeros and ones
_SMALL = 4096  # elements that are read at once instead
# The bytes of 1.0, the lowest first. All but the highest of 0.0 are zero, and that is its sign.
_ONES = {
    "float64": bytes.fromhex("000000000000f03f"),
    "float32": bytes.fromhex("0000803f"),
    "bfloat16": bytes.fromhex("803f"),
    "float16": bytes.fromhex("003c"),
    "float8_e5m2": bytes.fromhex("3c"),
    "float8_e4m3fn": bytes.fromhex("38"),
    "float8_e5m2fnuz": bytes.fromhex("40"),
    "float8_e4m3fnuz": bytes.fromhex("40"),
}
# All that a mask may contain. These dtypes have a negative zero, except those whose names end with fnuz.
_IN_MASKS = {
    name: {one, bytes(len(one)), *([] if name.endswith("fnuz") else [bytes(len(one) - 1) + b"\x80"])}
    for name, one in _ONES.items()
}


def plan_of(checkpoints: Sequence[Checkpoint], *, dtype: str, non_float: str) -> Plan:
    """Returns the plan of checkpoints, as `make_plan` does, after a look at values that it depends on."""
    specs = [checkpoint.spec for checkpoint in checkpoints]
    plan = make_plan(specs, dtype=dtype, non_float=non_float)
    if len(checkpoints) == 1:
        return plan
    spectral = [layer for layer in possible_spectral_norms(specs[0].tensors) if _has_unit_vectors(checkpoints, layer)]
    masks = find_masks(checkpoints, plan)
    if not masks and not spectral:
        return plan
    return make_plan(specs, dtype=dtype, non_float=non_float, masks=masks, spectral=spectral)


def _has_unit_vectors(checkpoints: Sequence[Checkpoint], layer: SpectralNorm) -> bool:
    for checkpoint in (checkpoints[0], checkpoints[-1]):
        for tensor in (checkpoint.spec.tensors[name] for name in (layer.u, layer.v)):
            length = read_ranges(checkpoint, [(tensor, 0, tensor.numel)])[0].double().norm().item()
            if not abs(length - 1) < 0.01:
                return False
    return True


def find_masks(checkpoints: Sequence[Checkpoint], plan: Plan) -> list[str]:
    """Returns the floating-point tensors with only zeros and ones in every checkpoint, and both in one of them.

    So a scale that is 0 in one checkpoint and 1 in another is no mask, unless its name says so. A tensor is not read in
    full if its samples are all equal, in the first and in the last checkpoint.
    """
    first = checkpoints[0]
    table, kinds = first.spec.tensors, plan.kinds
    plain = [
        table[each.name]
        for each in plan.tensors
        if each.source_dtype.kind == "float" and each.name not in kinds and each.numel
    ]
    candidates: list[str] = []
    for (file, dtype, parts), group in itertools.groupby(plain, attrgetter("file", "dtype", "parts")):
        tensors = list(group)
        # The first element shows of nearly every tensor that it is no mask.
        if parts:
            elements = [bytes(read_bytes(first, Ranges([(tensor, 0, 1)]))) for tensor in tensors]
        else:
            elements = first.files[file].read_each([tensor.offset for tensor in tensors], dtype.itemsize)
        found = _IN_MASKS[dtype.torch_name]
        candidates += [tensor.name for tensor, each in zip(tensors, elements, strict=True) if each in found]
    return [name for name in candidates if _is_mask(checkpoints, name)]


def _is_mask(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    is_mixed = bool(re.search(r"mask|init(?:t?ed|iali[sz]ed)|enabled", name.lower()))
    if not is_mixed and not any(_varies(each, name) for each in (checkpoints[0], checkpoints[-1])):
        return False
    for checkpoint in checkpoints:
        tensor = checkpoint.spec.tensors[name]
        ones = 0
        for _, contents in stream_bytes(checkpoint, tensor):
            found = _count_ones(bytes(contents), tensor.dtype)
            if found is None:
                return False
            ones += found
        is_mixed |= 0 < ones < tensor.numel
    return is_mixed


def _varies(checkpoint: Checkpoint, name: str) -> bool:
    """Whether samples of a tensor differ."""
    tensor = checkpoint.spec.tensors[name]
    if tensor.numel == 1:
        return False
    places = range(0, tensor.numel, -(-tensor.numel // _SAMPLES))
    ranges = [(tensor, place, place + 1) for place in places] if tensor.numel > _SMALL else [(tensor, 0, tensor.numel)]
    contents = bytes(read_bytes(checkpoint, Ranges(ranges)))
    size = tensor.dtype.itemsize
    return contents != contents[:size] * (len(contents) // size)


def _count_ones(contents: bytes, dtype: DType) -> int | None:
    """Returns how many floating-point values are one; None if some are neither zero nor one."""
    one = _ONES[dtype.torch_name]
    *others, highest = (contents[index :: len(one)] for index in range(len(one)))
    ones, zeros = highest.count(one[-1]), highest.count(0)
    if not dtype.torch_name.endswith("fnuz"):  # these have no negative zero
        zeros += highest.count(0x80)
    if ones + zeros < len(highest):
        return None
    for byte, found in zip(one, others, strict=False):
        if found != highest.translate(bytes(byte if high == one[-1] else 0 for high in range(256))):
            return None
    return ones
