"""What ranks compare before they start: their options, their versions and what they see of the checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.requests import AverageRequest, options_of
from ckpt_avg.distributed.ranks import Ranks, first_difference
from ckpt_avg.errors import CheckpointFormatError, RankError
from ckpt_avg.text import listing, quote
from ckpt_avg.version import __version__

_SAMPLES = 256  # of each checkpoint, spread over its files; at least both ends of each file
_SAMPLE = 4096  # bytes


def agree_on_request(ranks: Ranks, request: AverageRequest) -> None:
    """Compares the options and versions of all ranks, except options that no byte of the output depends on.

    Raises:
        RankError: they differ.
    """
    compared = [option for _, option in options_of(type(request)) if not option.metadata.get("own")]
    mine = {
        option.name: (_name if option.metadata.get("code") else _plain)(getattr(request, option.name))
        for option in compared
    }
    mine |= {"version of ckpt_avg": __version__, "version of torch": torch.__version__}

    def compare(requests: list[dict[str, Any]]) -> str | None:
        rank = first_difference(requests)
        if rank is None:
            return None
        names = [name for name in mine if requests[rank].get(name) != requests[0][name]]
        found = listing(f"{name} {requests[rank].get(name)!r}, not {requests[0][name]!r}" for name in names)
        return f"rank {rank} has other arguments or versions than rank 0: {found}"

    difference = ranks.exchange("request", mine, compare)
    if difference:
        raise RankError(f"{difference}. Start all ranks with the same command.")


def agree_on_files(ranks: Ranks, checkpoints: Sequence[Checkpoint]) -> None:
    """Compares what the ranks see of the checkpoints: names, sizes, headers and samples of the bytes.

    Raises:
        CheckpointFormatError: they differ.
    """
    if ranks.size == 1:
        return
    mine = [[str(checkpoint.spec.path), _fingerprint(checkpoint)] for checkpoint in checkpoints]

    def compare(seen: list[list[list[str]]]) -> str | None:
        rank = first_difference(seen)
        if rank is None:
            return None
        if [path for path, _ in seen[rank]] != [path for path, _ in seen[0]]:
            return f"rank {rank} has other checkpoints than rank 0: {_paths(seen[rank])}, not {_paths(seen[0])}"
        other = next(a[0] for a, b in zip(seen[0], seen[rank], strict=True) if a != b)
        return f"{other}: rank {rank} has another file than rank 0"

    difference = ranks.exchange("files", mine, compare)
    if difference:
        raise CheckpointFormatError(f"{difference}. Put the checkpoints on storage that all ranks share, or copy them.")


def agree_on_header(ranks: Ranks, header: bytes) -> None:
    """Compares the header that each rank has planned, since its length decides where the shares of the file begin.

    Raises:
        CheckpointFormatError: they differ.
    """
    digest = hashlib.sha256(header).hexdigest()
    rank = ranks.exchange("header", digest, first_difference)
    if rank is not None:
        raise CheckpointFormatError(
            f"rank {rank} plans another output than rank 0, so they see different checkpoints. Put the checkpoints on "
            "storage that all ranks share, or copy them."
        )


def _paths(seen: list[list[str]]) -> str:
    return listing(quote(path) for path, _ in seen)


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Returns a digest of a checkpoint's tensor table, and of bytes spread over its files."""
    digest = hashlib.sha256()
    for tensor in checkpoint.spec.tensors.values():
        digest.update(repr(tensor).encode())
    samples = max(2, _SAMPLES // max(1, len(checkpoint.files)))
    for file in checkpoint.files:
        digest.update(file.size.to_bytes(8, "little"))
        room = max(0, file.size - _SAMPLE)
        for sample in range(samples):
            digest.update(file.read(room * sample // (samples - 1), min(_SAMPLE, file.size)))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Returns a value that JSON can hold: an object's name instead of the object."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "__fspath__"):
        return str(value)
    return _name(value)


def _name(value: Any) -> str | None:
    return None if value is None else getattr(value, "__qualname__", type(value).__qualname__)
