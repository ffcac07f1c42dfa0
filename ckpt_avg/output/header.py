"""The header of the output, byte for byte as safetensors itself would write it.

The layout is that of the reference implementation (``safetensors/src/tensor.rs``, ``prepare``): compact JSON,
``__metadata__`` first, tensors by falling dtype rank and then by name, padded with spaces to a multiple of 8.
The reference writes two or more metadata keys in an order that differs between processes; here they are sorted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from ckpt_avg.errors import IncompatibleError, OutputError, ResourceError
from ckpt_avg.limits import LIMITS
from ckpt_avg.mean.plan import Plan


def encode_tensors(plan: Plan) -> str:
    """Returns what a header says of the tensors: a JSON object without its braces."""
    fields = {
        tensor.name: {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "data_offsets": (tensor.offset, tensor.offset + tensor.nbytes),
        }
        for tensor in plan.tensors
    }
    return _compact(fields)[1:-1]


def encode_header(tensors: str, metadata: Mapping[str, str], *, reserve: int = 0) -> bytes:
    """Returns the 8 bytes of length and the padded JSON.

    Args:
        tensors: what `encode_tensors` returned.
        metadata: strings for ``__metadata__``.
        reserve: bytes that the result must fill at least, spaces added; it allows metadata that is known only
            after the data to be written last.

    Raises:
        IncompatibleError: the header would exceed the format's limit.
    """
    about = f'"__metadata__":{_compact(dict(sorted(metadata.items())))}' if metadata else ""
    text = f"{{{','.join(filter(None, (about, tensors)))}}}".encode()
    length = max(len(text), reserve - 8)
    length += -length % 8
    if length > LIMITS.header:
        raise IncompatibleError(
            f"the output's header would take {length:,} bytes, and safetensors allows {LIMITS.header:,}. "
            "Average fewer tensors or checkpoints at once, or leave --sha256 out."
        )
    return struct.pack("<Q", length) + text.ljust(length)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def refuse_unreadable(path: Path, plan: Plan, target: Path) -> None:
    """Opens the finished file with safetensors itself before anybody else can.

    Raises:
        OutputError: safetensors cannot read it, or reads other tensors than were planned.
        ResourceError: memory or descriptors ran out.
    """
    try:
        with safe_open(str(path), framework="pt") as reader:
            names = set(reader.keys())
    except Exception as error:
        for sign, what in (("Cannot allocate memory", "out of memory"), ("Too many open files", "too many open files")):
            if sign in str(error):
                raise ResourceError(
                    f"{what}: opening what was written failed: {error}. Nothing is published."
                ) from error
        raise OutputError(
            f"{target}: safetensors cannot read what was written: {error}. Nothing is published."
        ) from error
    if names != {tensor.name for tensor in plan.tensors}:
        raise OutputError(f"{target}: safetensors reads other tensors than were written. Nothing is published.")
