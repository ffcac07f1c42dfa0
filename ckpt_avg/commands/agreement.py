"""What ranks compare before they start: their options, their versions and what they see of the checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field
from typing import Any

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.requests import AverageRequest, options_of
from ckpt_avg.distributed.ranks import Ranks, first_difference
from ckpt_avg.errors import CheckpointFormatError, RankError
from ckpt_avg.text import listing, quote
from ckpt_avg.version import __version__

_SAMPLES = 256  # of each checkpoint, spread over its files; at least both ends of each file
_SAMPLE = 4096  # bytes
_SHARE = "Put the checkpoints on storage that all ranks share, or copy them."


def agree_on_request(ranks: Ranks, request: AverageRequest) -> None:
    """Raises RankError if options or versions differ, except options that no byte of the output depends on."""
    if ranks.size == 1:
        return
    import torch

    compared = [option for _, option in options_of(type(request)) if not option.metadata.get("per_rank")]
    mine = comparable(request, compared)
    mine |= {"version of ckpt_avg": __version__, "version of torch": torch.__version__}
    _agree(ranks, "request", mine)


def agree_on_code(ranks: Ranks, request: AverageRequest) -> None:
    """Raises RankError if the names of the user's code differ, now that it is imported: its ``forward_batch``, too."""
    if ranks.size > 1:
        code = [option for _, option in options_of(type(request)) if option.metadata.get("code")]
        _agree(ranks, "code", comparable(request, code))


def _agree(ranks: Ranks, step: str, mine: dict[str, Any]) -> None:
    def describe(rank: int, first: dict[str, Any], other: dict[str, Any]) -> str:
        found = listing(f"{name} {other[name]!r}, not {first[name]!r}" for name in mine if other[name] != first[name])
        return f"rank {rank} has other arguments or versions than rank 0: {found}"

    if difference := _difference(ranks, step, mine, describe):
        raise RankError(f"{difference}. Start all ranks with the same command.")


def comparable(request: object, options: Iterable[Field[Any]]) -> dict[str, Any]:
    """Returns the values of options as JSON can hold them: of the user's code, its names."""
    return {
        option.name: (_name if option.metadata.get("code") else _plain)(getattr(request, option.name))
        for option in options
    }


def agree_on_files(ranks: Ranks, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises CheckpointFormatError if names, sizes, headers or samples of the checkpoints' bytes differ."""
    if ranks.size == 1:
        return
    mine = [[str(checkpoint.spec.path), _fingerprint(checkpoint)] for checkpoint in checkpoints]

    def describe(rank: int, first: list[list[str]], other: list[list[str]]) -> str:
        if [path for path, _ in other] != [path for path, _ in first]:
            return f"rank {rank} has other checkpoints than rank 0: {_paths(other)}, not {_paths(first)}"
        path = next(a[0] for a, b in zip(first, other, strict=True) if a != b)
        return f"{path}: rank {rank} has another file than rank 0"

    if difference := _difference(ranks, "files", mine, describe):
        raise CheckpointFormatError(f"{difference}. {_SHARE}")


def agree_on_header(ranks: Ranks, header: bytes) -> None:
    """Raises CheckpointFormatError if planned headers differ: their length decides where the ranks' shares begin."""
    digest = hashlib.sha256(header).hexdigest() if ranks.size > 1 else ""
    rank = ranks.exchange("header", digest, first_difference)
    if rank is not None:
        raise CheckpointFormatError(
            f"rank {rank} plans another output than rank 0, so they see different checkpoints. {_SHARE}"
        )


def _difference(ranks: Ranks, step: str, mine: Any, describe: Callable[[int, Any, Any], str]) -> str | None:
    """Returns the description of the first rank that differs from rank 0, on every rank."""

    def compare(values: list[Any]) -> str | None:
        rank = first_difference(values)
        return None if rank is None else describe(rank, values[0], values[rank])

    found: str | None = ranks.exchange(step, mine, compare)
    return found


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
