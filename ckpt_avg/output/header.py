"""The header of the output, byte for byte as safetensors itself would write it.

The layout is that of the reference implementation (``safetensors/src/tensor.rs``, ``prepare``): compact JSON,
``__metadata__`` first, tensors by falling dtype rank and then by name, padded with spaces to a multiple of 8. With
several metadata keys the reference uses another order in each process; here they are sorted.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from ckpt_avg.errors import IncompatibleError, OutputError, ResourceError
from ckpt_avg.limits import LIMITS
from ckpt_avg.mean.plan import Plan


def encode_tensors(plan: Plan) -> str:
    """Returns the tensors' part of a header: a JSON object without its braces."""
    fields = {
        tensor.name: {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "data_offsets": (tensor.offset, tensor.offset + tensor.nbytes),
        }
        for tensor in plan.tensors
    }
    return _compact(fields)[1:-1]


def encode_header(tensors: str, metadata: Mapping[str, str], *, room: int = 0, size: int = 0) -> bytes:
    """Returns the 8 bytes of length and the JSON, padded with spaces.

    Args:
        tensors: from `encode_tensors`.
        metadata: for ``__metadata__``.
        room: bytes to leave free for metadata that will be longer when the header is encoded again.
        size: bytes of the result, if it is to be longer than necessary.

    Raises:
        IncompatibleError: the header would exceed the format's limit.
    """
    about = f'"__metadata__":{_compact(dict(sorted(metadata.items())))}' if metadata else ""
    text = f"{{{','.join(filter(None, (about, tensors)))}}}".encode()
    length = max(len(text) + room, size - 8)
    length += -length % 8
    if length > LIMITS.header:
        raise IncompatibleError(
            f"the output's header would be {length:,} bytes long, but safetensors allows {LIMITS.header:,}. "
            "Average fewer tensors or checkpoints at once, or omit --sha256."
        )
    return struct.pack("<Q", length) + text.ljust(length)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def refuse_unreadable(path: Path, plan: Plan, target: Path) -> None:
    """Opens the finished file with safetensors itself, before it is published.

    Raises:
        OutputError: safetensors cannot read it, or finds other tensors than planned.
        ResourceError: memory or file descriptors ran out.
    """
    try:
        with safe_open(str(path), framework="pt") as reader:
            names = set(reader.keys())
    except Exception as error:
        reason = str(error)
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError as cause:  # which safetensors may report as a missing file
            reason = str(cause)
        for sign, what in (("Cannot allocate memory", "out of memory"), ("Too many open files", "too many open files")):
            if sign in reason:
                raise ResourceError(
                    f"{target}: {what} while checking the output: {reason}. It is not published."
                ) from error
        raise OutputError(f"{target}: safetensors cannot read the output: {error}. It is not published.") from error
    if names != {tensor.name for tensor in plan.tensors}:
        raise OutputError(f"{target}: safetensors finds other tensors than were written. It is not published.")
