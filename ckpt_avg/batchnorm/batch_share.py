"""Which of the user's batches each of several ranks runs.

A loader that gives every rank the same batches is shared out by their number: rank r of K runs batches r, r + K, …,
and skips the others. A loader that gives each rank its own (a `DistributedSampler`) is run as it is. Which of the two
it is, the first batches tell.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import secrets
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch

from ckpt_avg.distributed.ranks import Ranks, first_difference
from ckpt_avg.errors import UserCodeError

_SAMPLE = 4096  # elements of a tensor that are looked at


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
        iterator = iter(batches)
        first = list(islice(iterator, 1))
        self._batches = chain(first, iterator)
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
    """Returns a digest of what is in a batch: of tensors and arrays their shapes and elements spread over each.

    What cannot be looked into gets one that no other rank has: each then runs all of its own, which is never wrong.
    """
    contents = io.BytesIO()
    pickler = _Sampler(contents)
    pickler.fast = True  # without references to what came before, which tell of identity and not of contents
    try:
        pickler.dump(batch)
    except Exception:  # whatever an object's own code raises
        return secrets.token_hex(32)
    return hashlib.sha256(contents.getbuffer()).hexdigest()


class _Sampler(pickle.Pickler):
    """Writes an object with samples in place of its tensors and arrays, wherever they are in it. Nobody reads it."""

    def persistent_id(self, obj: Any) -> bytes | None:
        values = obj
        if hasattr(obj, "__array_interface__") and not isinstance(obj, type):
            try:
                values = torch.from_numpy(obj)
            except (TypeError, ValueError):  # of text or objects, or no array of numpy
                return None
        if not isinstance(values, torch.Tensor) or values.layout is not torch.strided or values.is_nested:
            return None
        flat = values.detach().resolve_conj().resolve_neg().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
        return f"{values.dtype}{list(values.shape)}".encode() + bytes(some.view(torch.uint8).tolist())
