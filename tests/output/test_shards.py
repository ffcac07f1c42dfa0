"""Shards, without huggingface_hub: tests/system/trainers compares with its own function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mean.plans import plan_of

from ckpt_avg.output.shards import index_name, ordered, parts, split


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    largest=st.integers(1, 200),
    offset=st.integers(0, 300),
    length=st.integers(0, 300),
)
def test_every_byte_of_the_plan_is_in_one_shard(lengths: list[int], largest: int, offset: int, length: int) -> None:
    """If it failed, bytes of the mean would be lost, or go to the wrong file."""
    plan = plan_of({f"t{n}": ("F32" if n % 2 else "U8", (size,)) for n, size in enumerate(lengths)})
    shards = split(plan, "model.safetensors", largest)
    assert [each.name for shard in shards for each in shard.tensors] == [
        each.name for each in ordered(plan, shards).tensors
    ]
    assert {each.name for each in ordered(plan, shards).tensors} == {each.name for each in plan.tensors}
    end = 0
    for shard in shards:
        assert shard.begin == end
        assert shard.nbytes <= largest or len(shard.tensors) == 1
        for tensor in shard.tensors:
            assert tensor.offset == end
            end += tensor.nbytes
        assert end == shard.begin + shard.nbytes
    assert end == plan.nbytes
    length = max(0, min(length, plan.nbytes - offset))
    found = list(parts(shards, offset, length))
    assert sum(stop - first for _, first, stop in found) == length
    for index, first, stop in found:
        assert shards[index].begin <= first < stop <= shards[index].begin + shards[index].nbytes


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("a-00001-of-00002-00002-of-00009.safetensors", "a-00001-of-00002.safetensors.index.json"),
        ("unet/model-00001-of-00002.safetensors", "unet/model.safetensors.index.json"),
    ],
)
def test_the_index_has_the_name_that_loaders_look_for(shard: str, index: str) -> None:
    assert index_name(shard) == index
