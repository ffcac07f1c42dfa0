"""The members of an uncompressed zip, as ``torch.save`` writes it, and nothing a zip may lie about.

The archive must begin at byte 0 and end with its directory; members must be stored, unencrypted, unique, inside
the file and apart from each other, and each local header must agree with the directory. The layout is that of
PKWARE's APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from ckpt_avg.errors import CheckpointFormatError, NoWeightsError
from ckpt_avg.files.input_file import Readable
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_BLOCK = 2**20
_MANY16, _MANY32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _SIZES_FOLLOW = 0x0001, 0x0008
_DAMAGED = "The file is damaged or was not written by torch.save: save or copy it again."


@dataclass(frozen=True, slots=True)
class Member:
    """One stored member: where its bytes lie in the file, and their CRC-32; 0 where it was not computed."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc: int
    size: int
    packed: int
    header: int


def read_members(file: Readable, most: int = LIMITS.tensors) -> Mapping[str, Member]:
    """Returns the members by name, every claim of the archive about them checked.

    Raises:
        CheckpointFormatError: the archive is truncated, compressed, encrypted, or contradicts itself.
    """
    start, length, count = _locate_directory(file, most)
    members: dict[str, Member] = {}
    end_of_previous = 0
    entries = sorted(_entries(file, file.read(start, length), count), key=lambda entry: entry.header)
    if entries and entries[0].header != 0:
        _fail(file, f"expected the archive at byte 0, got its first member at byte {entries[0].header:,}")
    if any(entry.name.endswith(b"/constants.pkl") and entry.name.count(b"/") == 1 for entry in entries):
        raise NoWeightsError(
            f"{file.path}: expected weights, got a TorchScript program. In a trusted environment, save them with "
            "torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    for entry in entries:
        member = _member(file, entry, start)
        if entry.header < end_of_previous:
            _fail(file, f"member {quote(member.name)} overlaps the one before it")
        if member.name in members:
            _fail(file, f"member {quote(member.name)} stands twice")
        members[member.name] = member
        end_of_previous = member.offset + member.size
    return members


def refuse_damaged(file: Readable) -> None:
    """Compares the bytes of every member with the CRC-32 that the archive records of them, if it does.

    Raises:
        CheckpointFormatError: they differ.
    """
    for member in read_members(file).values():
        crc, end = 0, member.offset + member.size
        for offset in range(member.offset, end, _BLOCK):
            crc = zlib.crc32(file.read(offset, min(_BLOCK, end - offset)), crc)
        if member.crc not in (0, crc):
            _fail(file, f"member {quote(member.name)}: expected CRC-32 {member.crc:08x}, got {crc:08x}")


def _fail(file: Readable, what: str) -> NoReturn:
    raise CheckpointFormatError(f"{file.path}: {what}. {_DAMAGED}")


def _locate_directory(file: Readable, most: int) -> tuple[int, int, int]:
    """Returns (first byte, bytes, number of entries) of the central directory."""
    if file.size < _END.size:
        _fail(file, f"a zip archive cut to {file.size} bytes")
    end_at = file.size - _END.size
    magic, disk, start_disk, here, count, length, start, comment = _END.unpack(file.read(end_at, _END.size))
    if magic != b"PK\x05\x06" or comment:
        _fail(
            file, "expected the file to end with the directory of its zip archive, got other bytes; it is probably cut"
        )
    limit = end_at
    if end_at >= _END64_LOCATOR.size:
        locator, _, at, _ = _END64_LOCATOR.unpack(file.read(end_at - _END64_LOCATOR.size, _END64_LOCATOR.size))
        if locator == b"PK\x06\x07":
            limit = end_at - _END64_LOCATOR.size
            if at + _END64.size > limit:
                _fail(file, "the zip64 directory record lies outside the archive")
            magic, _, _, _, disk, start_disk, here, count, length, start = _END64.unpack(file.read(at, _END64.size))
            if magic != b"PK\x06\x06":
                _fail(file, "the zip64 directory record is not where the archive says")
            limit = at
    if disk or start_disk or here != count:
        _fail(file, "an archive split over several disks")
    if length > LIMITS.zip_directory or count > most:
        _fail(
            file, f"expected a directory of at most {LIMITS.zip_directory:,} bytes, got {length:,} ({count:,} members)"
        )
    if start + length != limit:
        _fail(file, f"expected the directory to end at byte {limit:,}, got {start + length:,}")
    return start, length, count


def _entries(file: Readable, directory: bytes, count: int) -> Iterator[_Entry]:
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(directory):
            _fail(file, "the directory is shorter than it says")
        fields = _CENTRAL.unpack_from(directory, position)
        magic, flags, method, crc, packed, size = fields[0], fields[3], fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, comment_length, disk, header = *fields[10:14], fields[16]
        position += _CENTRAL.size
        name = directory[position : position + name_length]
        extra = directory[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or position > len(directory):
            _fail(file, "the directory is damaged")
        size, packed, header = _zip64(file, extra, size, packed, header)
        if disk:
            _fail(file, "an archive split over several disks")
        yield _Entry(name, flags, method, crc, size, packed, header)
    if position != len(directory):
        _fail(file, "the directory is longer than it says")


def _zip64(file: Readable, extra: bytes, *values: int) -> tuple[int, ...]:
    """Replaces each value of all ones by its 64-bit form out of the extra field, in order."""
    if _MANY32 not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if tag == 1:
            wide = iter(struct.unpack_from(f"<{len(body) // 8}Q", body))
            try:
                return tuple(next(wide) if value == _MANY32 else value for value in values)
            except (StopIteration, RuntimeError):
                break
        position += 4 + length
    _fail(file, "a member's zip64 sizes are missing")


def _member(file: Readable, entry: _Entry, directory_start: int) -> Member:
    try:
        name = entry.name.decode("utf-8")
    except UnicodeDecodeError:
        _fail(file, f"the member name {quote(entry.name)} is no UTF-8")
    what = f"member {quote(name)}"
    if entry.flags & _ENCRYPTED:
        _fail(file, f"{what} is encrypted")
    if entry.method != 0 or entry.packed != entry.size:
        _fail(file, f"{what} is compressed, which torch.save never does")
    if entry.header + _LOCAL.size > directory_start:
        _fail(file, f"{what} begins outside the archive")
    magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(
        file.read(entry.header, _LOCAL.size)
    )
    start = entry.header + _LOCAL.size + name_length + extra_length
    if magic != b"PK\x03\x04" or start + entry.size > directory_start:
        _fail(file, f"{what} lies outside the archive")
    same_name = file.read(entry.header + _LOCAL.size, name_length) == entry.name
    sizes_follow = bool(flags & _SIZES_FOLLOW) and (crc, packed, size) == (0, 0, 0)
    same_sizes = crc == entry.crc and size in (entry.size, _MANY32) and packed in (entry.size, _MANY32)
    if not same_name or flags != entry.flags or method != entry.method or not (sizes_follow or same_sizes):
        _fail(file, f"{what}: its local header contradicts the directory")
    return Member(name, start, entry.size, entry.crc)
