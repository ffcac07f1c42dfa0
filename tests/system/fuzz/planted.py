"""Readers with a planted bug each, which the harnesses must catch."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from system.fuzz.targets import Target, make_rewrite

from ckpt_avg.errors import CheckpointFormatError


def _length(content: bytes) -> int:
    if len(content) < 8:
        raise CheckpointFormatError("too short")
    return int(struct.unpack("<Q", content[:8])[0])


def wrong_exception(content: bytes) -> bool:
    """Looks at a byte that need not be there."""
    return content[_length(content) // 2 % 2**20] > 0


def endless(content: bytes) -> bool:
    """Waits for a brace that need not be at the end."""
    length, position = _length(content), 0
    while not content[8 : 8 + length].endswith(b"}"):
        position += 1
    return True


def trusting(content: bytes) -> bool:
    """Allocates what a length field says, up to 100 MB."""
    return len(bytearray(min(_length(content), 10**8))) > 0


def crashing(content: bytes) -> bool:
    """Dies where the file is shorter than it says, as an access after the end of a mapping does."""
    if 8 + _length(content) > len(content):
        os.kill(os.getpid(), signal.SIGBUS)
    return True


def lax(content: bytes) -> bool:
    """Reads a header as most scripts do: whatever json makes of it, and the last of two equal keys."""
    try:
        header = json.loads(content[8 : 8 + _length(content)])
        return all(entry["data_offsets"][1] <= len(content) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _keeping(read: Target) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        rewrite = make_rewrite(folder / "input.safetensors")

        def target(content: bytes) -> bool:
            rewrite(content)
            try:
                return read(content)
            except CheckpointFormatError:
                return False

        return target

    return make


PLANTED: Mapping[str, Callable[[Path], Target]] = {
    "wrong exception": _keeping(wrong_exception),
    "endless loop": _keeping(endless),
    "trusted length": _keeping(trusting),
    "crash": _keeping(crashing),
}
