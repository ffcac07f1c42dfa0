"""The stream that ``torch.save`` wrote before torch 1.6, and still writes on request.

It consists of five pickles: a magic number, a version, the machine's sizes, the objects, and the keys of the storages.
Each storage follows in the order of the keys: eight bytes with its number of elements, then the elements
(``_legacy_save`` in torch/serialization.py). So every tensor has an offset here too, and nothing is loaded.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Mapping
from typing import Any

from ckpt_avg.errors import fail
from ckpt_avg.files.input_file import Readable
from ckpt_avg.formats.pickles.mappings import with_dicts
from ckpt_avg.formats.pickles.stand_ins import StorageRef, UnreadableTensor
from ckpt_avg.formats.pickles.unpickler import read_next_pickle
from ckpt_avg.formats.torch_file import ByteRange, FileContents
from ckpt_avg.formats.torch_zip import BYTE_ORDER, CONVERT
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import plural, quote

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_BLOCK = 64 * 1024


def matches(head: bytes) -> bool:
    """Whether the first bytes are a pickle of torch's magic number."""
    return head.startswith(b"\x80") and _MAGIC.to_bytes(10, "little") in head[:32]


def read_contents(file: Readable) -> FileContents:
    """Reads the pickles and locates the storages after them.

    Raises:
        CheckpointFormatError: a pickle is damaged, or the storages do not fit them.
    """
    where = str(file.path)
    source = _Pickles(_Start(file), _BLOCK)
    magic, _ = read_next_pickle(source, where)
    version, _ = read_next_pickle(source, where)
    machine, _ = read_next_pickle(source, where)
    if magic != _MAGIC or version != _VERSION:
        fail(where, f"expected version {_VERSION} of torch's stream, got {quote(version)}")
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        fail(where, BYTE_ORDER, CONVERT)
    contents, storages = read_next_pickle(source, where)
    keys, _ = read_next_pickle(source, where)
    position = source.tell()
    digest = hashlib.sha256(file.read(0, position)).hexdigest()
    return FileContents(with_dicts(contents), _locate_storages(file, keys, storages, position).get, digest)


class _Start(io.RawIOBase):
    """The first bytes of a file, as many as pickles may have."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._position = 0
        self.size = min(file.size, LIMITS.pickle)

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        length = min(len(view), self.size - self._position)
        view[:length] = self._file.read(self._position, length)
        self._position += length
        return length


class _Pickles(io.BufferedReader):
    """A source of pickles, which allocates no more than its file has."""

    raw: _Start

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.raw.size - self.tell()
        return super().read(left if size is None else min(size, left))


def _locate_storages(
    file: Readable, keys: object, storages: Mapping[str, StorageRef | UnreadableTensor], position: int
) -> dict[str, ByteRange]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        fail(file.path, "expected a list of storage keys, each once")
    found: dict[str, ByteRange] = {}
    for key in keys:
        storage, where = storages.get(key), f"{file.path}: storage {quote(key)}"
        if not isinstance(storage, StorageRef) or storage.dtype is None:
            kind = storage.kind if isinstance(storage, UnreadableTensor) else "of unknown size"
            advice = "Save it again: torch.save(torch.load(path, weights_only=True), new_path)"
            fail(where, f"expected a plain storage, got one that is {kind}, so those after it cannot be found", advice)
        if storage.numel > LIMITS.elements:
            fail(where, "expected fewer than 2⁶³ elements")
        (numel,) = struct.unpack("<q", file.read(position, 8))
        nbytes = storage.numel * storage.dtype.itemsize
        if numel != storage.numel:
            fail(where, f"expected {storage.numel:,} elements, got {numel:,}")
        if (missing := position + 8 + nbytes - file.size) > 0:
            fail(where, f"{plural(missing, 'byte')} missing", "It is truncated: copy it again")
        found[key] = (position + 8, nbytes)
        position += 8 + nbytes
    if position != file.size:
        rest = plural(file.size - position, "byte")
        fail(file.path, f"expected the file to end after the last storage, got {rest} more")
    return found
