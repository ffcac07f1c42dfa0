"""The plan of open checkpoints, with the kinds of tensors that only values show: masks, and vectors of length 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import prefetch, read_ranges, stream
from ckpt_avg.mean.buffers import SpectralNorm, possible_spectral_norms
from ckpt_avg.mean.plan import Plan, make_plan

_SAMPLES = 256  # elements that show whether a tensor may contain both zeros and ones
_SMALL = 4096  # elements that are read at once instead


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
    tensors = checkpoints[0].spec.tensors
    floats = (each for each in plan.tensors if each.source_dtype.kind == "float" and each.numel)
    plain = [tensors[each.name] for each in floats if each.name not in plan.kinds]
    # The first element shows of nearly every tensor that it is no mask.
    firsts = [(tensor, 0, 1) for tensor in plain]
    prefetch(checkpoints[0], firsts)
    values = torch.cat([torch.empty(0), *map(_comparable, read_ranges(checkpoints[0], firsts))])
    candidates = (values.eq(0) | values.eq(1)).nonzero().squeeze(1).tolist()
    return [plain[index].name for index in candidates if _is_mask(checkpoints, plain[index].name)]


def _is_mask(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    is_mixed = bool(re.search(r"mask|init(?:t?ed|iali[sz]ed)|enabled", name.lower()))
    if not is_mixed and not any(_varies(each, name) for each in (checkpoints[0], checkpoints[-1])):
        return False
    for checkpoint in checkpoints:
        ones = numel = 0
        for _, values in stream(checkpoint, checkpoint.spec.tensors[name]):
            if not _is_binary(values):
                return False
            ones, numel = ones + int(_comparable(values).count_nonzero()), numel + len(values)
        is_mixed |= 0 < ones < numel
    return is_mixed


def _varies(checkpoint: Checkpoint, name: str) -> bool:
    """Whether samples of a tensor differ."""
    tensor = checkpoint.spec.tensors[name]
    places = range(0, tensor.numel, -(-tensor.numel // _SAMPLES))
    ranges = [(tensor, place, place + 1) for place in places] if tensor.numel > _SMALL else [(tensor, 0, tensor.numel)]
    values = _comparable(torch.cat(read_ranges(checkpoint, ranges)))
    return bool(values.ne(values[0]).any())


def _is_binary(values: torch.Tensor) -> bool:
    values = _comparable(values)
    return bool((values.eq(0) | values.eq(1)).all())


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """Returns values of any floating-point dtype as torch can compare them: it cannot compare float8."""
    return values.float() if values.element_size() == 1 else values
