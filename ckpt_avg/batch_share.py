"""Which of the user's batches each of several ranks runs.

A loader that gives every rank the same batches is shared out by their number: rank r of K runs batches r, r + K, …,
and skips the others. A loader that gives each rank its own (a `DistributedSampler`) is run as it is. Which of the two
it is, the first batches tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch

from ckpt_avg.errors import UserCodeError
from ckpt_avg.ranks import Ranks, first_difference

_SAMPLE = 4096  # elements of a tensor that are looked at
_DEPTH = 3  # objects within objects


class BatchShare:
    """The batches of one rank.

    Args:
        batches: those that the loader gives here.
        ranks: all ranks.
        max_batches: run at most this many, on all ranks together.

    Attributes:
        seen: batches that the loader has given, those skipped included.
    """

    def __init__(self, batches: Iterable[Any], ranks: Ranks, max_batches: int | None) -> None:
        self.seen = 0
        self._ranks = ranks
        self._limit = max_batches
        self._digest = hashlib.sha256()
        self._iterator = iter(batches)
        first = list(islice(self._iterator, 1))
        self._batches = chain(first, self._iterator)
        mine = fingerprint(first[0]) if first and ranks.size > 1 else None
        self._is_common = ranks.exchange("first batch", mine, lambda seen: first_difference(seen) is None)

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches to run here."""
        rank, size = self._ranks.rank, self._ranks.size
        if not self._is_common:
            own = None if self._limit is None else len(range(rank, self._limit, size))
            for batch in islice(self._batches, own):
                self.seen += 1
                yield batch
            return
        for batch in islice(self._batches, self._limit):
            if size > 1:
                self._digest.update(fingerprint(batch).encode())
            self.seen += 1
            if (self.seen - 1) % size == rank:
                yield batch

    def account(self) -> list[Any]:
        """Returns what rank 0 compares in the end: how many batches the loader gave, and which."""
        return [self.seen, self._digest.hexdigest()] if self._is_common else [0, ""]


def refuse_other_batches(accounts: list[list[Any]]) -> None:
    """Raises UserCodeError where ranks that share the batches out by number were given different ones."""
    rank = first_difference(accounts)
    if rank is not None:
        counts = f"{accounts[0][0]:,} on rank 0 and {accounts[rank][0]:,} on rank {rank}"
        raise UserCodeError(
            f"BatchNorm refresh: expected the same batches on every rank, since the first one was the same, got others "
            f"on rank {rank} than on rank 0 ({counts}). Give the loader's shuffle a fixed seed, or each rank its own "
            "part of the data with DistributedSampler."
        )


def fingerprint(batch: Any) -> str:
    """Returns a digest of what is in a batch: of tensors and arrays their shapes and elements spread over each."""
    digest = hashlib.sha256()
    for leaf in _leaves(batch, _DEPTH):
        digest.update(_bytes_of(leaf))
    return digest.hexdigest()


def _leaves(batch: Any, depth: int) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for key, item in batch.items():
            yield key
            yield from _leaves(item, depth)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from _leaves(item, depth)
    elif depth and hasattr(batch, "__dict__") and not isinstance(batch, torch.Tensor):  # of graph libraries
        yield from _leaves(vars(batch), depth - 1)
    else:
        yield batch


def _bytes_of(leaf: Any) -> bytes:
    if isinstance(leaf, (str, bytes, bool, int, float, complex)):
        return repr(leaf).encode("utf-8", "backslashreplace")
    if hasattr(leaf, "__array_interface__"):
        try:
            leaf = torch.from_numpy(leaf)
        except (TypeError, ValueError):  # of text, or of objects
            return f"{leaf.dtype}{leaf.shape}{leaf.ravel()[:_SAMPLE].tolist()!r}".encode("utf-8", "backslashreplace")
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__qualname__.encode()
    about = f"{leaf.dtype}{list(leaf.shape)}".encode()
    if leaf.layout is not torch.strided or not leaf.numel():
        return about
    flat = leaf.detach().resolve_conj().resolve_neg().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
    return about + bytes(some.view(torch.uint8).tolist())
