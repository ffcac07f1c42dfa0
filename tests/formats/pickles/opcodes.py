"""Pickles written opcode by opcode, as torch writes them and as nobody should, without torch."""

from __future__ import annotations

import os
import pickletools
import struct
from collections.abc import Mapping

MAGIC = 0x1950A86A20F9469CFC6C
STOP = b"."


class Runs:
    """An object whose pickle calls ``os.system`` when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def deep() -> object:
    """A value whose pickle is small, and whose text has 2⁴⁰ parts."""
    value: object = ()
    for _ in range(40):
        value = (value, value)
    return value


def proto(body: bytes, version: int = 2) -> bytes:
    """Returns a whole pickle."""
    return b"\x80" + bytes([version]) + body + STOP


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def large(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw))) + raw


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def mapping(items: Mapping[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in items.items()) + b"u"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


def restored(module: str, name: str, state: Mapping[str, bytes]) -> bytes:
    """An object of a class, filled with a state."""
    return named(module, name) + b")\x81" + mapping({text(key): value for key, value in state.items()}) + b"b"


def tensor(key: str, shape: tuple[int, ...], *, kind: str = "FloatStorage", view: bool = False) -> bytes:
    """A contiguous tensor with a storage of its own; ``view``: as streams before torch 1.6 name it."""
    numel, stride = 1, []
    for extent in reversed(shape):
        stride.insert(0, numel)
        numel *= extent
    last = (b"N",) if view else ()
    storage = sequence(text("storage"), named("torch", kind), text(key), text("cpu"), whole(numel), *last) + b"Q"
    sizes, steps = sequence(*map(whole, shape)), sequence(*map(whole, stride))
    hooks = called(named("collections", "OrderedDict"))
    return called(named("torch._utils", "_rebuild_tensor_v2"), storage, whole(0), sizes, steps, b"\x89", hooks)


def operations(*pickles: bytes) -> tuple[bytes, ...]:
    """Splits pickles into their operations, each with its argument."""
    found = []
    for stream in pickles:
        starts = [position for _, _, position in pickletools.genops(stream)]
        found += [stream[begin:end] for begin, end in zip(starts, [*starts[1:], len(stream)], strict=True)]
    return tuple(found)
