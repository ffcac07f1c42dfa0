"""The members of an uncompressed zip, as ``torch.save`` writes it.

The archive must begin at byte 0 and end with its directory, or with a comment after it. Members must be uncompressed,
unencrypted, unique, inside the file and disjoint, and each local header and data descriptor must agree with the
directory. The layout is that of PKWARE's APPNOTE 6.3, sections 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12
(directory), 4.3.14 to 4.3.16 (its end) and 4.5 (extra fields).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckpt_avg.errors import NoWeightsError, fail
from ckpt_avg.files.input_file import Readable
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_BLOCK = 2**20
_PADDING = 128  # bytes of extra fields that are read with a local header; torch writes fewer
_MANY16, _MANY32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _SIZES_FOLLOW = 0x0001, 0x0008


@dataclass(frozen=True, slots=True)
class Member:
    """One member: where its bytes are in the file, and their CRC-32; 0 if it was not computed."""

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
    """Returns the members by name, after checking all that the archive says of them.

    Raises:
        CheckpointFormatError: the archive is truncated, compressed, encrypted, or contradicts itself.
    """
    start, length, count = _locate_directory(file, most)
    members: dict[str, Member] = {}
    end_of_previous = 0
    entries = sorted(_entries(file, file.read(start, length), count), key=lambda entry: entry.header)
    if entries and entries[0].header != 0:
        fail(file.path, f"expected the archive at byte 0, got its first member at byte {entries[0].header:,}")
    if any(entry.name.endswith(b"/constants.pkl") and entry.name.count(b"/") == 1 for entry in entries):
        raise NoWeightsError(
            f"{file.path}: expected weights, got a TorchScript program. In a trusted environment, save them with "
            "torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    for entry in entries:
        member = _member(file, entry, start)
        if entry.header < end_of_previous:
            fail(file.path, f"member {quote(member.name)} overlaps the one before it")
        if member.name in members:
            fail(file.path, f"member {quote(member.name)} appears twice")
        members[member.name] = member
        end_of_previous = member.offset + member.size
    return members


def refuse_damaged(file: Readable) -> None:
    """Compares the bytes of every member with the CRC-32 in the archive, if there is one.

    Raises:
        CheckpointFormatError: they differ.
    """
    for member in read_members(file).values():
        end = member.offset + member.size
        blocks = (file.read(offset, min(_BLOCK, end - offset)) for offset in range(member.offset, end, _BLOCK))
        check_crc(file, member, blocks)


def check_crc(file: Readable, member: Member, blocks: Iterable[bytes]) -> None:
    """Raises CheckpointFormatError if the bytes of a member don't have its CRC-32."""
    crc = 0
    for block in blocks:
        crc = zlib.crc32(block, crc)
    if member.crc not in (0, crc):
        fail(file.path, f"member {quote(member.name)}: expected CRC-32 {member.crc:08x}, got {crc:08x}")


def _locate_directory(file: Readable, most: int) -> tuple[int, int, int]:
    """Returns (first byte, bytes, number of entries) of the central directory."""
    if file.size < _END.size:
        fail(file.path, f"expected a zip archive, got {file.size} bytes of one")
    end_at = _find_end(file)
    _, disk, start_disk, here, count, length, start, _ = _END.unpack(file.read(end_at, _END.size))
    limit = end_at
    if end_at >= _END64_LOCATOR.size:
        locator, _, at, _ = _END64_LOCATOR.unpack(file.read(end_at - _END64_LOCATOR.size, _END64_LOCATOR.size))
        if locator == b"PK\x06\x07":
            limit = end_at - _END64_LOCATOR.size
            if at + _END64.size > limit:
                fail(file.path, "the zip64 directory record is outside the archive")
            magic, _, _, _, disk, start_disk, here, count, length, start = _END64.unpack(file.read(at, _END64.size))
            if magic != b"PK\x06\x06":
                fail(file.path, "the zip64 directory record is not where the archive says")
            limit = at
    if disk or start_disk or here != count:
        fail(file.path, "expected one archive, got one split over several disks")
    if length > LIMITS.zip_directory or count > most:
        fail(
            file.path,
            f"expected a directory of at most {LIMITS.zip_directory:,} bytes, got {length:,} ({count:,} members)",
        )
    if start + length != limit:
        fail(file.path, f"expected the directory to end at byte {limit:,}, got {start + length:,}")
    return start, length, count


def _find_end(file: Readable) -> int:
    """Returns the byte at which the end of the directory begins, which only a comment may follow."""
    tail = file.read(file.size - min(file.size, _END.size + _MANY16), min(file.size, _END.size + _MANY16))
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        fail(file.path, "expected the zip directory at the end of the file, got other bytes: it is probably truncated")
    *_, comment = _END.unpack_from(tail, at)
    if rest := len(tail) - at - _END.size - comment:
        advice = "If torch.load reads it, save it again: torch.save(torch.load(path, weights_only=True), new_path)"
        fail(file.path, f"expected the file to end with the zip archive in it, got {rest:+,} bytes", advice)
    return file.size - len(tail) + at


def _entries(file: Readable, directory: bytes, count: int) -> Iterator[_Entry]:
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(directory):
            fail(file.path, "the directory is shorter than it says")
        fields = _CENTRAL.unpack_from(directory, position)
        magic, flags, method, crc, packed, size = fields[0], fields[3], fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, comment_length, disk, header = *fields[10:14], fields[16]
        position += _CENTRAL.size
        name = directory[position : position + name_length]
        extra = directory[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or position > len(directory):
            fail(file.path, "the directory is damaged")
        size, packed, header = _zip64(file, extra, size, packed, header)
        if disk:
            fail(file.path, "expected one archive, got one split over several disks")
        yield _Entry(name, flags, method, crc, size, packed, header)
    if position != len(directory):
        fail(file.path, "the directory is longer than it says")


def _zip64(file: Readable, extra: bytes, *values: int) -> tuple[int, ...]:
    """Returns the values, with the 64-bit form from the extra field in place of each value of all ones, in order."""
    needed = values.count(_MANY32)
    position = 0
    while needed and position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if tag == 1 and len(body) >= 8 * needed:
            wide = iter(struct.unpack_from(f"<{needed}Q", body))
            return tuple(next(wide) if value == _MANY32 else value for value in values)
        position = len(extra) if tag == 1 else position + 4 + length
    if needed:
        fail(file.path, "a member's zip64 sizes are missing")
    return values


def _member(file: Readable, entry: _Entry, directory_start: int) -> Member:
    try:
        name = entry.name.decode("utf-8")
    except UnicodeDecodeError:
        fail(file.path, f"the member name {quote(entry.name)} is not UTF-8")
    what = f"member {quote(name)}"
    if entry.flags & _ENCRYPTED:
        fail(file.path, f"{what} is encrypted")
    if entry.method != 0 or entry.packed != entry.size:
        fail(file.path, f"{what} is compressed, which torch.save never does")
    if entry.header + _LOCAL.size > directory_start:
        fail(file.path, f"{what} begins outside the archive")
    head = file.read(entry.header, min(_LOCAL.size + len(entry.name) + _PADDING, directory_start - entry.header))
    magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack_from(head)
    start = entry.header + _LOCAL.size + name_length + extra_length
    if magic != b"PK\x03\x04" or start + entry.size > directory_start:
        fail(file.path, f"{what} is outside the archive")
    begin = _LOCAL.size + name_length
    extra = head[begin : begin + extra_length]
    if len(extra) < extra_length:
        extra = file.read(start - extra_length, extra_length)
    sizes_follow = bool(flags & _SIZES_FOLLOW)
    agrees = name_length == len(entry.name) and head[_LOCAL.size : begin] == entry.name and _is_divided(extra)
    agrees = agrees and flags == entry.flags and method == entry.method
    if agrees and not (sizes_follow and (crc, packed, size) == (0, 0, 0)):
        agrees = crc == entry.crc and _zip64(file, extra, size, packed) == (entry.size, entry.size)
    if not agrees:
        fail(file.path, f"{what}: its local header contradicts the directory")
    end = start + entry.size
    if sizes_follow and not _is_descriptor(file.read(end, min(24, directory_start - end)), entry):
        fail(file.path, f"{what}: the data descriptor after it contradicts the directory")
    return Member(name, start, entry.size, entry.crc)


def _is_divided(extra: bytes) -> bool:
    """Whether extra fields have the length that they say."""
    position = 0
    while position + 4 <= len(extra):
        position += 4 + int.from_bytes(extra[position + 2 : position + 4], "little")
    return position == len(extra)


def _is_descriptor(following: bytes, entry: _Entry) -> bool:
    """Whether these bytes begin with a member's data descriptor: signature, CRC-32 and sizes, of 32 or 64 bits."""
    forms = ["<4sI2Q"] if entry.size > _MANY32 else ["<4sI2Q", "<4s3I"]
    expected = (struct.pack(form, b"PK\x07\x08", entry.crc, entry.size, entry.size) for form in forms)
    return following.startswith(tuple(expected))
