"""Which of the user's batches each of several ranks runs.

A loader with a `DistributedSampler` gives each rank batches of its own, and the rank runs them all. Any other loader is
expected to give every rank the same batches: rank r of K runs batches r, r + K, … and skips the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckpt_avg.distributed.ranks import Ranks, first_difference
from ckpt_avg.errors import UserCodeError
from ckpt_avg.user_code.batches import fetch


class BatchShare:
    """The batches that one rank runs.

    Args:
        batches: the user's loader.
        ranks: all ranks.
        max_batches: run at most this many, on all ranks together.

    Attributes:
        seen: batches that the loader has given, skipped ones included.
    """

    def __init__(self, batches: Iterable[Any], ranks: Ranks, max_batches: int | None) -> None:
        self.seen = 0
        self._batches, self._ranks = batches, ranks
        self._is_common = not has_distributed_sampler(batches)
        self._limit = max_batches
        if max_batches is not None and not self._is_common:
            self._limit = len(range(ranks.rank, max_batches, ranks.size))

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches to run here."""
        for batch in fetch(self._batches, self._limit):
            self.seen += 1
            if not self._is_common or (self.seen - 1) % self._ranks.size == self._ranks.rank:
                yield batch

    @property
    def count_to_compare(self) -> int | None:
        """How many batches the loader gave; None if other ranks may have another number."""
        return self.seen if self._is_common else None


def has_distributed_sampler(loader: Iterable[Any]) -> bool:
    """Whether a loader gives each rank its own part of the data."""
    from torch.utils.data import DistributedSampler

    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def refuse_other_counts(counts: Sequence[int | None]) -> None:
    """Raises UserCodeError if ranks that share the batches by number got different numbers of them."""
    rank = first_difference(counts)
    if rank is not None:
        gave = ["its part by DistributedSampler" if count is None else f"{count:,} batches" for count in counts]
        raise UserCodeError(
            f"BatchNorm refresh: the loader gave rank 0 {gave[0]}, and rank {rank} {gave[rank]}. Use the same loader "
            "on every rank, or a DistributedSampler on every rank."
        )
