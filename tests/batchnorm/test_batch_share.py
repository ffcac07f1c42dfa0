"""Batches over ranks: the statistics are those of one process, however the batches are handed out."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from system.faults.rank_runs import in_threads
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from ckpt_avg import BatchNormReport, UserCodeError, refresh_batch_norm
from ckpt_avg.batchnorm.batch_share import BatchShare, has_distributed_sampler
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import RankError

estimators = pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
Loader = Callable[[Ranks], Iterable[Any]]


def net() -> nn.Module:
    """Returns a model with two BatchNorm layers, the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3), nn.BatchNorm1d(3)
        )


def some(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    """Returns batches of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 6, generator=generator) * (1 + size) + size for size in sizes]


def refreshed(size: int, loader: Loader, **options: Any) -> list[Any]:
    """Refreshes a model of its own on each rank: the report and the buffers of each, or its error."""
    models, before = [net() for _ in range(size)], net().state_dict()

    def work(ranks: Ranks) -> tuple[BatchNormReport, dict[str, torch.Tensor]]:
        model = models[ranks.rank]
        try:
            report = refresh_batch_norm(model, loader(ranks), ranks=ranks, **options)
        except Exception:  # leaves the model as it was
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            raise
        return report, copy.deepcopy(model.state_dict())

    return in_threads(size, work)


class Own:
    """A loader of a rank's own batches."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            TensorDataset(torch.zeros(1)), num_replicas=1, rank=0
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def alone(batches: Iterable[Any], **options: Any) -> tuple[BatchNormReport, dict[str, torch.Tensor]]:
    model = net()
    return refresh_batch_norm(model, batches, **options), model.state_dict()


def assert_same(found: tuple[BatchNormReport, dict[str, torch.Tensor]], expected: Any) -> None:
    """Asserts that float64 statistics agree to 1e-12 of their scale, and everything else exactly."""
    (report, buffers), (right, wanted) = found, expected
    assert (report.batches, report.samples) == (right.batches, right.samples)
    for name, statistics in right.statistics.items():
        mine = report.statistics[name]
        for field in ("count", "calls_per_batch", "batches_tracked"):
            assert getattr(mine, field) == getattr(statistics, field), field
        # A mean may lie near zero by itself; what it is small against is the spread.
        deviation = statistics.variance.sqrt()
        assert ((mine.mean - statistics.mean).abs() <= 1e-12 * (statistics.mean.abs() + deviation)).all()
        assert ((mine.variance - statistics.variance).abs() <= 1e-12 * statistics.variance).all()
    torch.testing.assert_close(buffers, wanted, rtol=1e-6, atol=1e-6)


# -- The same batches on every rank ---------------------------------------------------------------------------------


@estimators
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_find_the_statistics_of_one_process(size: int, estimator: str) -> None:
    """If it failed, the published statistics would depend on how many ranks there were."""
    batches = some(5, 4, 7, 2, 3, 9, 4)
    expected = alone(batches, estimator=estimator)
    found = refreshed(size, lambda ranks: batches, estimator=estimator)
    for each in found:
        assert_same(each, expected)
        assert all(torch.equal(each[1][name], found[0][1][name]) for name in each[1])  # to the last bit on all ranks


@pytest.mark.guarantee("uneven-ranks")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_batches_than_ranks_are_enough(count: int) -> None:
    """If it failed, ranks without a batch would hang, fail, or leave the layers unreached."""
    batches = some(*range(3, 3 + count))
    expected = alone(batches)
    for found in refreshed(4, lambda ranks: batches):
        assert_same(found, expected)


def test_a_batch_is_run_on_one_rank_only() -> None:
    """If it failed, ranks would save no time, or count batches twice."""
    ran: list[tuple[int, int]] = []
    batches = some(3, 4, 5, 6, 7)

    def work(ranks: Ranks) -> None:
        def forward(model: nn.Module, batch: torch.Tensor) -> None:
            ran.append((len(batch), ranks.rank))
            model(batch)

        refresh_batch_norm(net(), batches, forward_batch=forward, ranks=ranks)

    assert in_threads(2, work) == [None, None]
    assert sorted(ran) == [(3, 0), (4, 1), (5, 0), (6, 1), (7, 0)]


@estimators
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_the_limit_counts_batches_of_all_ranks_together_and_ends_an_endless_loader(limit: int, estimator: str) -> None:
    """If it failed, --bn-batches would mean something else with ranks, or an endless loader would never end."""

    def endless() -> Iterator[torch.Tensor]:
        return (some(2 + number % 5, seed=number)[0] for number in itertools.count())

    expected = alone(endless(), max_batches=limit, estimator=estimator)
    assert expected[0].batches == limit
    for found in refreshed(3, lambda ranks: endless(), max_batches=limit, estimator=estimator):
        assert_same(found, expected)


@given(st.integers(0, 40), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 50)))
def test_shares_by_number_are_apart_and_cover_what_is_run(count: int, size: int, limit: int | None) -> None:
    """If it failed, a batch would be run twice, or by nobody."""
    shares = []
    for rank in range(size):
        share = BatchShare(map(torch.tensor, range(count)), Ranks(rank, size), limit)
        shares.append([int(batch) for batch in share])
        assert share.seen == min(count, math.inf if limit is None else limit)
    assert sorted(itertools.chain(*shares)) == list(range(share.seen))


def test_an_empty_loader_is_refused_on_every_rank() -> None:
    """If it failed, ranks would publish statistics of nothing, or one would wait."""
    ends = refreshed(3, lambda ranks: [])
    assert [type(end) for end in ends] == [UserCodeError] * 3
    assert all("the dataloader is empty" in str(end) for end in ends)


# -- Each rank its own batches --------------------------------------------------------------------------------------


@estimators
@pytest.mark.parametrize("size", [2, 3])
def test_a_distributed_sampler_gives_every_batch_of_every_rank(size: int, estimator: str) -> None:
    """If it failed, a training script's own loader would be cut to 1/K of its data a second time."""
    data = TensorDataset(torch.cat(some(13, 8, 9, 6)))

    def loader(ranks: Ranks) -> DataLoader[Any]:
        sampler = DistributedSampler(data, num_replicas=size, rank=ranks.rank, shuffle=False, drop_last=True)
        return DataLoader(data, batch_size=4, sampler=sampler)

    per_rank = [list(loader(Ranks(rank, size))) for rank in range(size)]
    expected = alone([batch for each in per_rank for batch in each], estimator=estimator)
    for found in refreshed(size, loader, estimator=estimator):
        assert_same(found, expected)


@estimators
@pytest.mark.parametrize("lengths", [(3, 1, 2), (0, 2, 1), (2, 0, 0), (1, 4, 0)])
def test_ranks_with_more_or_fewer_batches_of_their_own(lengths: tuple[int, ...], estimator: str) -> None:
    """If it failed, uneven loaders would hang, or drop what the longer ones hold."""
    own = [some(*range(3, 3 + length), seed=rank) for rank, length in enumerate(lengths)]
    expected = alone([batch for each in own for batch in each], estimator=estimator)
    for found in refreshed(3, lambda ranks: Own(own[ranks.rank]), estimator=estimator):
        assert_same(found, expected)


@pytest.mark.parametrize("limit", [1, 2, 4, 5])
def test_the_limit_is_shared_out_where_each_rank_has_its_own(limit: int) -> None:
    """If it failed, --bn-batches 100 on 8 ranks would run 800 batches, or 96."""
    own = [some(3, 4, 5, seed=rank) for rank in range(3)]
    quota = [len(range(rank, limit, 3)) for rank in range(3)]
    expected = alone([batch for each, most in zip(own, quota, strict=True) for batch in each[:most]])
    assert expected[0].batches == limit
    for found in refreshed(3, lambda ranks: Own(own[ranks.rank]), max_batches=limit):
        assert_same(found, expected)


def test_a_distributed_sampler_is_found_in_a_batch_sampler_too() -> None:
    """If it failed, a loader that makes its batches by a batch sampler would be cut to 1/K of its part."""
    data = TensorDataset(torch.zeros(8, 2))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    assert has_distributed_sampler(DataLoader(data, sampler=sampler))
    assert has_distributed_sampler(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False)))
    for loader in (DataLoader(data, shuffle=True), DataLoader(data, batch_size=None), [torch.zeros(2, 2)], iter([])):
        assert not has_distributed_sampler(loader)


# -- Loaders that differ -----------------------------------------------------------------------------


@pytest.mark.guarantee("uneven-ranks")
def test_other_numbers_of_batches_are_refused_on_every_rank() -> None:
    """If it failed, a rank would wait for a batch that never comes, or some batches would be skipped."""
    batches = some(3, 4, 5, 6)
    ends = refreshed(3, lambda ranks: batches[: 4 - ranks.rank])
    assert [type(end) for end in ends] == [UserCodeError] * 3
    for end in ends:
        assert str(end) == (
            "BatchNorm refresh: the loader gave rank 0 4 batches, and rank 1 3 batches. Use the same loader on every "
            "rank, or a DistributedSampler on every rank."
        )


def test_a_distributed_sampler_on_one_rank_only_is_refused_on_every_rank() -> None:
    """If it failed, some batches would be run twice and others skipped."""
    ends = refreshed(2, lambda ranks: Own(some(3, 4)) if ranks.is_first else some(3, 4))
    assert [type(end) for end in ends] == [UserCodeError] * 2
    assert all("gave rank 0 its part by DistributedSampler, and rank 1 2 batches. " in str(end) for end in ends)


def test_an_error_of_the_loader_on_one_rank_is_its_own_and_the_others_name_it() -> None:
    """If it failed, a loader that breaks half-way on one rank would leave the others waiting at the end."""

    def loader(ranks: Ranks) -> Iterator[torch.Tensor]:
        yield from some(3, 4)
        if ranks.rank == 1:
            raise OSError("the disk is gone")
        yield from some(5, 6)

    ends = refreshed(3, loader)
    assert type(ends[1]) is UserCodeError
    assert str(ends[1]).startswith("the dataloader raised at batch 3: OSError: the disk is gone. See ")
    for rank in (0, 2):
        assert isinstance(ends[rank], RankError)
        assert str(ends[rank]).startswith(
            "rank 1 failed: the dataloader raised at batch 3: OSError: the disk is gone. "
        )


def test_a_layer_that_only_another_rank_reached_counts_as_reached() -> None:
    """If it failed, models that take other paths for other batches would be refused on some ranks."""

    class Paths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.even(batch) if len(batch) % 2 == 0 else self.odd(batch)

    batches = some(4, 5, 6, 7)
    expected = refresh_batch_norm(Paths(), batches)
    for found in in_threads(2, lambda ranks: refresh_batch_norm(Paths(), batches, ranks=ranks)):
        assert_same((found, {}), (expected, {}))


def test_a_layer_that_no_rank_reached_is_refused_on_every_rank() -> None:
    """If it failed, one rank would publish statistics that another refuses."""
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})

    def work(ranks: Ranks) -> None:
        refresh_batch_norm(
            copy.deepcopy(model), some(3, 4), forward_batch=lambda model, batch: model["used"](batch), ranks=ranks
        )

    ends = in_threads(2, work)
    assert [type(end) for end in ends] == [UserCodeError] * 2
    assert all("no batch reaches the BatchNorm layers 'unused'" in str(end) for end in ends)
