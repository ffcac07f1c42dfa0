"""`UnpublishedWeights`: what is written by its offset in the plan is in the right shard, and no page has two ranks."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from mean.plans import plan_of

from ckpt_avg.mean.blocks import cut_into_blocks
from ckpt_avg.output.shards import ordered, split
from ckpt_avg.output.unpublished_weights import UnpublishedWeights


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60_000), min_size=1, max_size=6),
    size=st.integers(1, 40),
    begin=st.integers(1, 5000).map(lambda n: 8 * n),
    dtype=st.sampled_from(["F64", "F32", "BF16", "BOOL"]),
    elements=st.integers(1, 50_000),
    largest=st.sampled_from([1, 30_000, 100_000, 10**9]),
)
def test_the_shares_of_ranks_cover_every_element_once_and_begin_at_pages(
    lengths: list[int], size: int, begin: int, dtype: str, elements: int, largest: int
) -> None:
    """If it failed, elements would be omitted or computed twice, or two ranks would write to one page."""
    page = 64 * 1024
    mixed = {f"t{n}": (dtype if n % 3 else "U8", (length,)) for n, length in enumerate(lengths)}
    shards = split(plan_of(mixed), "model.safetensors", largest)
    plan = ordered(plan_of(mixed), shards)
    weights = UnpublishedWeights([], shards, [b" " * begin] * len(shards), {})
    shares = [weights.share(rank, size) for rank in range(size)]
    assert shares[0].start == 0
    assert shares[-1].stop == plan.nbytes
    assert all(before.stop == after.start for before, after in itertools.pairwise(shares))
    inner = {share.start for share in shares} - {shard.begin for shard in shards} - {plan.nbytes}
    begins = {bound: max(shard.begin for shard in shards if shard.begin <= bound) for bound in inner}
    assert all((begin + bound - begins[bound]) % page == 0 for bound in inner)
    assert all(abs(len(share) - plan.nbytes / size) <= page for share in shares)
    found: dict[str, list[tuple[int, int]]] = {tensor.name: [] for tensor in plan.tensors}
    for share in shares:
        covered = 0
        for blocks in cut_into_blocks(plan, elements, share):
            assert sum(block.numel for block in blocks) <= elements
            for tensor, start, stop in itertools.chain.from_iterable(block.ranges for block in blocks):
                found[tensor.name].append((start, stop))
                covered += (stop - start) * tensor.dtype.itemsize
        assert covered == len(share)
    for tensor in plan.tensors:
        edges = sorted(found[tensor.name])
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges)][: len(edges)]
        assert (edges[-1][1] if edges else 0) == tensor.numel
