"""Blocks: they cover the output once and in order, and know where a checkpoint stores their elements."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mean.plans import Tensors, plan_of, tensors

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.mean import blocks as module
from ckpt_avg.mean.blocks import Block, cut_into_blocks
from ckpt_avg.mean.plan import OutputTensor

FLOAT32 = BY_TORCH_NAME["float32"]


@given(tensors=tensors, elements=st.integers(1, 500), dtype=st.sampled_from(["keep", "float32"]))
@settings(max_examples=60, deadline=None)
def test_blocks_cover_every_element_once_and_in_order(tensors: Tensors, elements: int, dtype: str) -> None:
    plan = plan_of(tensors, dtype=dtype)
    lists = list(cut_into_blocks(plan, elements))
    blocks = [block for each in lists for block in each]
    covered = [
        (tensor.name, index) for block in blocks for tensor, start, stop in block.ranges for index in range(start, stop)
    ]
    assert covered == [(tensor.name, index) for tensor in plan.tensors for index in range(tensor.numel)]
    end = 0
    for block in blocks:
        assert block.numel == sum(stop - start for _, start, stop in block.ranges) > 0
        assert block.offset == end
        for tensor, start, stop in block.ranges:
            assert tensor.offset + start * tensor.dtype.itemsize == end
            assert (tensor.source_dtype, tensor.dtype) == (block.source_dtype, block.dtype)
            assert (tensor.rule == "mean") == (block.rule == "mean")
            end = tensor.offset + stop * tensor.dtype.itemsize
        assert block.offset + block.nbytes == end
    assert end == plan.nbytes
    numels = [sum(block.numel for block in each) for each in lists]
    assert all(numel == elements for numel in numels[:-1])
    assert all(0 < numel <= elements for numel in numels)


def test_the_number_of_tensors_at_a_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TENSORS", 3)
    plan = plan_of({str(index): ("F32", (2,)) for index in range(8)})
    assert [len(block.ranges) for (block,) in cut_into_blocks(plan, 1000)] == [3, 3, 2]


def test_tensors_without_elements_are_in_no_block() -> None:
    plan = plan_of({"a": ("F32", (0,)), "b": ("I64", (3, 0))})
    assert plan.nbytes == 0
    assert list(cut_into_blocks(plan, 10)) == []


def test_a_block_can_be_split_and_knows_its_tensors() -> None:
    a, b, c = (OutputTensor(name, (10,), FLOAT32, FLOAT32, "mean", 40 * i, 10) for i, name in enumerate("abc"))
    block = Block([(a, 7, 10), (b, 0, 10), (c, 0, 2)])
    assert (block.numel, block.offset, block.nbytes) == (15, 28, 60)
    found = [(tensor.name, index) for tensor, index in map(block.locate, (0, 2, 3, 12, 13, 14))]
    assert found == [("a", 7), ("a", 9), ("b", 0), ("b", 9), ("c", 0), ("c", 1)]
    with pytest.raises(IndexError):
        block.locate(15)
    for elements, expected in ((4, ["a", "b", "b", "bc"]), (13, ["ab", "c"])):
        parts = block.split(elements, ())
        assert ["".join(tensor.name for tensor, _, _ in part.ranges) for part in parts] == expected
        assert parts[0].offset == 28


@pytest.mark.parametrize(("offsets", "stored"), [((0, 40), 1), ((100, 140), 1), ((0, 44), 2), ((40, 0), 2)])
def test_consecutive_tensors_of_a_checkpoint_are_one_range(offsets: tuple[int, int], stored: int) -> None:
    outputs = [OutputTensor(name, (10,), FLOAT32, FLOAT32, "mean", 40 * i, 10) for i, name in enumerate("ab")]
    tensors = {
        name: TensorSpec(name, FLOAT32, (10,), (1,), 0, offset, (offset, 40))
        for name, offset in zip("ab", offsets, strict=True)
    }
    checkpoint = Checkpoint(CheckpointSpec(Path("a"), "raw", tensors), ())
    ranges = Block([(outputs[0], 2, 10), (outputs[1], 0, 5)]).stored_in(checkpoint)
    bytes_of = [(tensor.offset + 4 * start, tensor.offset + 4 * stop) for tensor, start, stop in ranges]
    apart = [(offsets[0] + 8, offsets[0] + 40), (offsets[1], offsets[1] + 20)]
    assert bytes_of == ([(apart[0][0], apart[1][1])] if stored == 1 else apart)
