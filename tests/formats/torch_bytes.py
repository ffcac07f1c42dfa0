"""torch files written byte by byte: a zip of two members, a pickle of one tensor ``w`` and its eight bytes."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from formats.pickles.opcodes import MAGIC, called, large, listed, named, proto, sequence, text, whole

DATA = struct.pack("<2f", 1, 2)
DAMAGED = "The file is damaged: save or copy it again."
DISTRUST = "Don't trust this file; save the weights again where they come from."
FLOATS = named("torch", "FloatStorage")


@dataclass(frozen=True)
class Member:
    """One member of an archive; ``None``: what is true."""

    name: bytes
    data: bytes
    method: int = 0
    stored: bytes | None = None  # the bytes in the file
    size: int | None = None
    at: int | None = None  # in the directory: where its local header is
    extra: bytes = b""  # in the directory
    flags: int = 0
    sizes: tuple[int, int, int] | None = None  # in the local header: CRC-32, bytes in the file, bytes
    local_extra: bytes = b""
    after: bytes = b""  # a data descriptor

    def _sizes(self) -> tuple[int, int, int]:
        size = len(self.data) if self.size is None else self.size
        return zlib.crc32(self.data), size if self.stored is None else len(self.stored), size

    def header(self) -> bytes:
        """The local header and the bytes after it."""
        sizes = self.sizes or self._sizes()
        fields = (20, self.flags, self.method, 0, 0, *sizes, len(self.name), len(self.local_extra))
        stored = self.data if self.stored is None else self.stored
        return struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + self.name + self.local_extra + stored + self.after

    def entry(self, at: int) -> bytes:
        """What the directory says."""
        lengths = (len(self.name), len(self.extra), 0, 0, 0, 0, at if self.at is None else self.at)
        fields = (20, 20, self.flags, self.method, 0, 0, *self._sizes(), *lengths)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + self.name + self.extra


def end(count: int, length: int, start: int) -> bytes:
    """The end of the directory."""
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, start, 0)


def body_and_directory(*members: Member) -> tuple[bytes, bytes]:
    body, directory = b"", b""
    for member in members:
        directory += member.entry(len(body))
        body += member.header()
    return body, directory


def archive(*members: Member) -> bytes:
    body, directory = body_and_directory(*members)
    return body + directory + end(len(members), len(directory), len(body))


def number(value: int) -> bytes:
    return whole(value) if abs(value) < 2**31 else large(value)


def storage(kind: bytes = FLOATS, key: bytes = text("0"), numel: bytes = whole(2), *view: bytes) -> bytes:
    """A reference to a record; in streams before torch 1.6 with a view of another, or None."""
    return sequence(text("storage"), kind, key, text("cpu"), numel, *view) + b"Q"


def tensor(
    stored: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,)
) -> bytes:
    """A view of a storage."""
    lengths = [sequence(*map(number, each)) for each in (shape, stride)]
    return called(
        named("torch._utils", "_rebuild_tensor_v2"), stored or storage(), number(offset), *lengths, b"\x89", b"}"
    )


def state(*items: tuple[bytes, bytes]) -> bytes:
    """A dict of pickled keys and values."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def weights(value: bytes, name: str = "w") -> bytes:
    """A state dict of one value."""
    return state((text(name), value))


PICKLE = Member(b"a/data.pkl", proto(weights(tensor())))
RECORD = Member(b"a/data/0", DATA)
WHOLE = archive(PICKLE, RECORD)
BODY, DIRECTORY = body_and_directory(PICKLE, RECORD)


def holding(contents: bytes, *others: Member) -> bytes:
    """The archive with other contents of its pickle."""
    return archive(Member(b"a/data.pkl", proto(contents)), *others, RECORD)


# --- the stream of torch before 1.6: five pickles and two storages ------------------------------------------

OLD = {
    "magic": proto(large(MAGIC)),
    "version": proto(whole(1001)),
    "machine": proto(state((text("little_endian"), b"\x88"))),
    "contents": b"",
    "keys": proto(listed(text("0"), text("1"))),
    "storages": struct.pack("<q", 2) + DATA + struct.pack("<q", 1) + DATA[:4],
}


def old(kind: bytes = FLOATS, numel: bytes = whole(2), view: bytes = b"N", **changed: bytes) -> bytes:
    """The stream, with another first storage or other parts."""
    first, second = storage(kind, text("0"), numel, view), storage(FLOATS, text("1"), whole(1), b"N")
    contents = proto(state((text("w"), tensor(first)), (text("b"), tensor(second, shape=(1,)))))
    return b"".join({**OLD, "contents": contents, **changed}.values())


def write(folder: Path, content: bytes, name: str = "step_1.pt") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
