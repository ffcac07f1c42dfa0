"""Shards: which tensors are in which file, and the index that says so, as huggingface_hub lays them out.

The rule is that of its ``split_torch_state_dict_into_shards``, given the tensors in the order of the plan: a shard is
full if the next tensor would make it larger than the limit, and a tensor that is larger itself has a shard of its own.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_avg.formats.sharded import SUFFIX
from ckpt_avg.mean.plan import OutputTensor, Plan
from ckpt_avg.output.provenance import SHARDS_DIGEST

SAFETENSORS = ".safetensors"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the weights.

    Attributes:
        name: of the file.
        tensors: in it, in order; consecutive ones of the plan.
        begin: the offset of its first byte in the plan's data section.
        nbytes: of its own data section.
        prefix: what the names of its tensors begin with in the plan, and not in the file.
    """

    name: str
    tensors: tuple[OutputTensor, ...]
    begin: int
    nbytes: int
    prefix: str = ""


def whole(plan: Plan, name: str) -> tuple[Shard, ...]:
    """Returns the only file, which contains all tensors."""
    return (Shard(name, plan.tensors, 0, plan.nbytes),)


def split(plan: Plan, name: str, largest: int) -> tuple[Shard, ...]:
    """Returns the shards; the only file if all tensors fit into it.

    Args:
        plan: what is written. `ordered` returns it in the order of the shards.
        name: of the only file, for example ``model.safetensors``. Those of shards follow from it.
        largest: bytes of tensors in a shard, unless it has only one.
    """
    stem = name.removesuffix(SAFETENSORS)
    groups: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    filled = 0
    for tensor in plan.tensors:
        if tensor.nbytes > largest:
            groups.append([tensor])
            continue
        if filled + tensor.nbytes > largest:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.nbytes
    if current:
        groups.append(current)
    if len(groups) == 1:
        return whole(plan, name)
    shards: list[Shard] = []
    begin = 0
    for number, group in enumerate(groups, start=1):
        end, placed = begin, []
        for tensor in group:
            placed.append(replace(tensor, offset=end))
            end += tensor.nbytes
        shards.append(Shard(f"{stem}-{number:05}-of-{len(groups):05}{SAFETENSORS}", tuple(placed), begin, end - begin))
        begin = end
    return tuple(shards)


def ordered(plan: Plan, shards: Sequence[Shard]) -> Plan:
    """Returns the plan with its tensors in the order and at the offsets of the shards."""
    return replace(plan, tensors=tuple(tensor for shard in shards for tensor in shard.tensors))


def parts(shards: Sequence[Shard], offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yields, for each shard with some of these bytes of the plan's data section, its index and the first and last + 1.

    Both are offsets in the plan's data section.
    """
    end = offset + length
    index = bisect.bisect_right(shards, offset, key=lambda shard: shard.begin) - 1
    while offset < end:
        shard = shards[index]
        stop = min(end, shard.begin + shard.nbytes)
        if offset < stop:
            yield index, offset, stop
            offset = stop
        index += 1


def index_name(shard: str) -> str:
    """Returns the name of the index of shards, of which one has this name."""
    return re.sub(r"-\d+-of-\d+(?=\.safetensors$)", "", shard) + SUFFIX


def index_metadata(total_size: int, digest: str) -> dict[str, object]:
    """Returns the metadata of an index: the bytes of all tensors, and the digest of the shards, in hex."""
    return {"total_size": total_size, SHARDS_DIGEST: f"sha256:{digest}"}


def encode_index(tensors: Iterable[tuple[str, Iterable[str]]], metadata: Mapping[str, object]) -> bytes:
    """Returns the index: of each shard the file's name and the names of its ``tensors``, and the ``metadata``."""
    weight_map = {name: file for file, names in tensors for name in names}
    return f"{json.dumps({'metadata': metadata, 'weight_map': weight_map}, indent=2)}\n".encode()
