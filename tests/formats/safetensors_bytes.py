"""safetensors files written byte by byte."""

from __future__ import annotations

import struct


def lay_out(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file: length, header, data. ``length`` may lie."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype: str = '"U8"', shape: str = "[1]", offsets: str = "[0,1]", name: str = "w", data: bytes = b"\1") -> bytes:
    """A file of one tensor, each field as JSON text; valid as it stands."""
    return lay_out(f'{{"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}', data)
