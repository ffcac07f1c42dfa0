"""Zip archives that contradict themselves: each is the archive of `torch_bytes` with one thing changed."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formats.pickles.opcodes import named, proto
from formats.reading import assert_same, read, refusal
from formats.torch_bytes import (
    BODY,
    DAMAGED,
    DATA,
    DIRECTORY,
    PICKLE,
    RECORD,
    WHOLE,
    Member,
    archive,
    end,
    state,
    storage,
    tensor,
    text,
    write,
)

from ckpt_avg.checkpoint.tensor_reads import read_ranges, stream
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint

RECORD_AT = len(PICKLE.header())
# Where the headers of the second member and the end of the directory begin, and their fields: (offset, bytes).
STARTS = {"local": RECORD_AT, "central": len(BODY) + len(PICKLE.entry(0)), "end": len(BODY + DIRECTORY)}
FIELDS: dict[str, dict[str, tuple[int, int]]] = {
    "local": {"flags": (6, 2), "method": (8, 2), "crc": (14, 4), "packed": (18, 4), "size": (22, 4), "name": (30, 1)},
    "central": {
        **{"magic": (0, 2), "flags": (8, 2), "method": (10, 2), "crc": (16, 4), "packed": (20, 4), "size": (24, 4)},
        **{"name length": (28, 2), "extra length": (30, 2), "disk": (34, 2), "header": (42, 4), "name": (46, 1)},
    },
    "end": {
        **{"disk": (4, 2), "start disk": (6, 2), "here": (8, 2), "count": (10, 2), "length": (12, 4), "start": (16, 4)},
    },
}


def with_field(content: bytes, part: str, field: str, value: int) -> bytes:
    offset, width = FIELDS[part][field]
    at = STARTS[part] + offset
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


def test_the_unchanged_archive_is_read(tmp_path: Path) -> None:
    """By the standard library, by torch (which wants one member more), and here, all alike."""
    version = Member(b"a/version", b"3\n")
    for content in (WHOLE, archive(version, PICKLE, RECORD), zip64()):
        path = write(tmp_path, content)
        with zipfile.ZipFile(path) as zipped:
            assert zipped.testzip() is None
            assert zipped.read("a/data/0") == DATA
        assert read(path)["w"].tolist() == [1, 2]
    assert torch.load(write(tmp_path, archive(version, PICKLE, RECORD)))["w"].tolist() == [1, 2]


CONTRADICTS = "member 'a/data/0': its local header contradicts the directory"


@pytest.mark.guarantee("zip-structure")
@pytest.mark.parametrize(
    ("part", "field", "value", "fact"),
    [
        ("both", "flags", 1, "member 'a/data/0' is encrypted"),
        ("central", "flags", 1, "member 'a/data/0' is encrypted"),
        ("local", "flags", 1, CONTRADICTS),
        ("both", "method", 8, "member 'a/data/0' is compressed, which torch.save never does"),
        ("central", "method", 8, "member 'a/data/0' is compressed"),
        ("local", "method", 8, CONTRADICTS),
        ("both", "method", 99, "member 'a/data/0' is compressed"),
        ("local", "crc", 1, CONTRADICTS),
        ("central", "crc", 1, CONTRADICTS),
        ("local", "size", 4, CONTRADICTS),
        ("local", "packed", 4, CONTRADICTS),
        ("central", "packed", 4, "member 'a/data/0' is compressed"),
        ("central", "size", 4, "member 'a/data/0' is compressed"),
        ("local", "name", ord("b"), CONTRADICTS),
        ("central", "name", ord("b"), "member 'b/data/0': its local header contradicts the directory"),
        ("central", "name", 0xFF, r"the member name b'\xff/data/0' is not UTF-8"),
        ("central", "header", 10**6, "member 'a/data/0' begins outside the archive"),
        ("central", "header", 2**32 - 2, "member 'a/data/0' begins outside the archive"),
        ("central", "header", 2**32 - 1, "a member's zip64 sizes are missing"),
        ("central", "header", 0, CONTRADICTS),
        ("central", "header", RECORD_AT + 1, "member 'a/data/0' is outside the archive"),
        ("central", "disk", 1, "split over several disks"),
        ("central", "magic", 0, "the directory is damaged"),
        ("central", "name length", 9, "directory"),
        ("central", "name length", 0xFFFF, "the directory is damaged"),
        ("central", "extra length", 5, "the directory"),
        ("end", "disk", 1, "expected one archive, got one split over several disks"),
        ("end", "start disk", 1, "split over several disks"),
        ("end", "here", 1, "split over several disks"),
        ("end", "length", 10, "expected the directory to end at byte"),
        ("end", "start", 0, f"expected the directory to end at byte {len(BODY + DIRECTORY):,}, got"),
        ("end", "start", 2**32 - 1, "expected the directory to end at byte"),
        ("end", "length", 2**32 - 1, "expected a directory of at most 268,435,456 bytes, got 4,294,967,295"),
    ],
)
def test_one_changed_field_is_found(tmp_path: Path, part: str, field: str, value: int, fact: str) -> None:
    content = WHOLE
    for each in ("local", "central") if part == "both" else (part,):
        content = with_field(content, each, field, value)
    message = refusal(write(tmp_path, content))
    assert fact in message
    assert message.endswith(DAMAGED)


@pytest.mark.parametrize("count", [0, 1, 3, 0xFFFF])
def test_a_wrong_count_of_members(tmp_path: Path, count: int) -> None:
    content = BODY + DIRECTORY + end(count, len(DIRECTORY), len(BODY))
    fact = "the directory is longer than it says" if count < 2 else "the directory is shorter than it says"
    assert f"{fact}. {DAMAGED}" in refusal(write(tmp_path, content))


@pytest.mark.parametrize("size", [9, 10**6, 2**32 - 2])
def test_a_member_larger_than_the_file(tmp_path: Path, size: int) -> None:
    message = refusal(write(tmp_path, archive(PICKLE, replace(RECORD, size=size))))
    assert f"member 'a/data/0' is outside the archive. {DAMAGED}" in message


INNER = RECORD.header()  # a complete member, hidden in the bytes of another
OUTER = Member(b"a/outer", b"\0" * 10 + INNER)
OTHER = replace(RECORD, name=b"a/data/1")
CUT = "expected the zip directory at the end of the file, got other bytes: it is probably truncated"
PREFIXES = (b"PK\3\4junk", b"PK\3\4" + b"\0" * 60)
SHIFTED = "expected the directory to end at byte"
ZIPS: dict[str, tuple[bytes, str]] = {
    "truncated to 10 bytes": (WHOLE[:10], "expected a zip archive, got 10 bytes of one"),
    "a comment, which may look like an end": (WHOLE[:-2] + b"\x16\0" + WHOLE[-22:-2] + b"\0\0", SHIFTED),
    **{f"{len(prefix)} bytes before it": (prefix + WHOLE, SHIFTED) for prefix in PREFIXES},
    **{
        f"{len(prefix)} bytes before it, offsets adjusted": (
            prefix + BODY + PICKLE.entry(len(prefix)) + RECORD.entry(len(prefix) + RECORD_AT)
            + end(2, len(DIRECTORY), len(prefix) + len(BODY)),
            f"expected the archive at byte 0, got its first member at byte {len(prefix)}",
        )
        for prefix in PREFIXES
    },
    "one name twice": (archive(PICKLE, RECORD, RECORD), "member 'a/data/0' appears twice"),
    "one member listed twice": (archive(PICKLE, RECORD, replace(OTHER, at=RECORD_AT)), "contradicts the directory"),
    "one member inside another": (
        archive(PICKLE, OUTER, replace(RECORD, at=RECORD_AT + 30 + len(OUTER.name) + 10)),
        "member 'a/data/0' overlaps the one before it",
    ),
    "deflated": (
        archive(PICKLE, replace(RECORD, method=8, stored=zlib.compress(DATA)[2:-4])),
        "member 'a/data/0' is compressed, which torch.save never does",
    ),
    "a deflated pickle": (
        archive(replace(PICKLE, method=8, stored=zlib.compress(PICKLE.data)[2:-4]), RECORD),
        "member 'a/data.pkl' is compressed, which torch.save never does",
    ),
    "deflated by its size alone": (
        archive(PICKLE, replace(RECORD, stored=DATA[:4])), "member 'a/data/0' is compressed"),
    "too few zip64 sizes": (
        archive(PICKLE, replace(RECORD, at=2**32 - 1, extra=struct.pack("<2HI", 1, 4, 8))),
        "a member's zip64 sizes are missing",
    ),
}  # fmt: skip


@pytest.mark.guarantee("zip-cut", "zip-structure")
@pytest.mark.parametrize("case", ZIPS)
def test_a_zip_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    """Otherwise the weights would be other bytes than the writer's."""
    content, fact = ZIPS[case]
    message = refusal(write(tmp_path, content))
    assert fact in message
    assert message.endswith(DAMAGED)


@pytest.mark.parametrize("comment", [b"\0", b"made by hand", b"PK\5\6", b"x" * 1_000])
def test_a_zip_with_a_comment_is_read(tmp_path: Path, comment: bytes) -> None:
    version = Member(b"a/version", b"3\n")
    content = archive(version, PICKLE, RECORD)
    path = write(tmp_path, content[:-2] + struct.pack("<H", len(comment)) + comment)
    if comment != b"PK\5\6":  # which torch takes for the end
        assert torch.load(path)["w"].tolist() == read(path)["w"].tolist() == [1, 2]
    else:
        assert CUT in refusal(path)


@pytest.mark.parametrize("rest", [1, 4096, 65_000])
def test_bytes_after_a_zip_are_counted(tmp_path: Path, rest: int) -> None:
    """torch reads such a file: the message must not say that it is truncated."""
    message = refusal(write(tmp_path, WHOLE + bytes(rest)))
    assert (
        f"expected the file to end with the zip archive in it, got {rest:+,} bytes. If torch.load reads it" in message
    )


def test_a_zip_after_other_bytes_is_no_zip(tmp_path: Path) -> None:
    assert "something else (first bytes b'junkPK" in refusal(write(tmp_path, b"junk" + WHOLE))


@pytest.mark.guarantee("zip-cut")
def test_truncated_anywhere(tmp_path: Path, run_folder: Path) -> None:
    """The archive by hand at every length, and a real one."""
    real = (run_folder / "epoch_20.pt").read_bytes()
    cuts = [WHOLE[:length] for length in range(len(WHOLE))]
    for content in (*cuts, *(real[:at] for at in (30, 512, 4096, len(real) // 2, len(real) - 23, len(real) - 1))):
        message = refusal(write(tmp_path, content))
        assert len(content) < 22 or CUT in message


@pytest.mark.guarantee("zip-structure")
def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = bytes(50_000_000)
    member = replace(RECORD, data=bomb, method=8, stored=zlib.compress(bomb)[2:-4])
    path = write(tmp_path, archive(PICKLE, member))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "member 'a/data/0' is compressed" in message


# --- what local headers and data descriptors say ---


def descriptor(crc: int = zlib.crc32(DATA), size: int = 8, form: str = "<4s3I") -> bytes:
    return struct.pack(form, b"PK\7\x08", crc, size, size)


MANY = 2**32 - 1
STREAMED = replace(RECORD, flags=8, sizes=(0, 0, 0), after=descriptor())
WIDE = replace(RECORD, sizes=(zlib.crc32(DATA), MANY, MANY), local_extra=struct.pack("<2H2Q", 1, 16, 8, 8))
PADDED = replace(RECORD, local_extra=b"FB\x08\0ZZZZZZZZ")


@pytest.mark.parametrize("record", [STREAMED, replace(STREAMED, after=descriptor(form="<4sI2Q")), WIDE, PADDED])
def test_sizes_after_the_data_or_in_extra_fields_are_read(tmp_path: Path, record: Member) -> None:
    assert read(write(tmp_path, archive(PICKLE, record)))["w"].tolist() == [1, 2]


@pytest.mark.guarantee("zip-structure")
@pytest.mark.parametrize(
    "record",
    [
        replace(STREAMED, after=descriptor(crc=1)),
        replace(STREAMED, after=descriptor(size=9)),
        replace(STREAMED, after=descriptor(size=9, form="<4sI2Q")),
        replace(STREAMED, after=descriptor()[4:]),
        replace(STREAMED, after=b""),
        replace(STREAMED, flags=0),
        replace(WIDE, local_extra=struct.pack("<2H2Q", 1, 16, 9, 8)),
        replace(WIDE, local_extra=struct.pack("<2H2Q", 1, 16, 8, 9)),
        replace(PADDED, local_extra=b"FB\x09\0ZZZZZZZZ"),
        replace(PADDED, local_extra=b"FB\x07\0ZZZZZZZZ"),
    ],
)
def test_sizes_that_contradict_the_directory_are_refused(tmp_path: Path, record: Member) -> None:
    """Otherwise the weights may be bytes that the writer did not put there."""
    assert "contradicts the directory" in refusal(write(tmp_path, archive(PICKLE, record)))


@pytest.mark.slow
@pytest.mark.guarantee("zip-structure")
def test_a_flipped_bit_changes_no_tensor(tmp_path: Path) -> None:
    """Outside the elements themselves, in a file that torch wrote: the file is refused, or it makes no difference."""
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(3).half()}, "epoch": 3}, path)
    expected, content = read(path), path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        elements = [tensor.storage for tensor in checkpoint.spec.tensors.values()]
    for position in range(len(content)):
        if not any(begin <= position < begin + length for begin, length in elements):
            for bit in range(8):
                changed = bytearray(content)
                changed[position] ^= 1 << bit
                path.write_bytes(changed)
                with contextlib.suppress(CheckpointFormatError):
                    assert_same(read(path), expected)


@pytest.mark.guarantee("zip-structure")
def test_the_pickle_must_have_its_crc(tmp_path: Path) -> None:
    """One bit of a stride in it transposes a tensor. torch itself does not look."""
    changed = PICKLE.data.replace(tensor(), tensor(stride=(0,)))
    assert len(changed) == len(PICKLE.data)
    content = WHOLE.replace(PICKLE.data, changed)
    expected = f"member 'a/data.pkl': expected CRC-32 {zlib.crc32(PICKLE.data):08x}, got {zlib.crc32(changed):08x}. "
    assert expected + DAMAGED in refusal(write(tmp_path, content))


def test_a_file_without_crcs_is_read(tmp_path: Path) -> None:
    """torch can leave them out."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read(tmp_path / "a.pt"), {"w": torch.ones(2)})


# --- zip64 -------------------------------------------------------------------------------------------------


def zip64_end(count: int, length: int, start: int, at: int, magic: bytes = b"PK\6\6") -> bytes:
    """The record, the locator and the end of a directory in 64 bits."""
    record = struct.pack("<4sQ2H2I4Q", magic, 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    return record + locator + end(min(count, 0xFFFF), 2**32 - 1, 2**32 - 1)


def zip64(*, count: int = 2, length: int = len(DIRECTORY), start: int = len(BODY), at: int | None = None,
          magic: bytes = b"PK\6\6") -> bytes:  # fmt: skip
    """The archive with its end in 64 bits."""
    begin = len(BODY + DIRECTORY)
    return BODY + DIRECTORY + zip64_end(count, length, start, begin if at is None else at, magic)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (zip64(at=2**63), "the zip64 directory record is outside the archive"),
        (zip64(at=2**64 - 1), "the zip64 directory record is outside the archive"),
        (zip64(at=0), "the zip64 directory record is not where the archive says"),
        (zip64(magic=b"PK\6\5"), "the zip64 directory record is not where the archive says"),
        (zip64(length=2**40), "expected a directory of at most"),
        (zip64(length=2**64 - 1), "expected a directory of at most"),
        (zip64(start=2**63), "expected the directory to end at byte"),
        (zip64(count=2**40), "(1,099,511,627,776 members)"),
        (BODY + DIRECTORY + zip64()[len(BODY + DIRECTORY) :].replace(struct.pack("<Q", 2), b"\2" + bytes(6) + b"\1", 1),
         "split over several disks"),
    ],
)  # fmt: skip
def test_wrong_zip64_records_are_refused(tmp_path: Path, content: bytes, fact: str) -> None:
    assert fact in refusal(write(tmp_path, content))


def wide(path: Path, members: dict[bytes, tuple[int, dict[int, bytes]]], claimed: int | None = None) -> Path:
    """Writes members of (size, {position: bytes}), all else zeros, with 64-bit sizes throughout; sparse."""
    most, directory = 2**32 - 1, b""
    with path.open("wb") as file:
        for name, (size, pieces) in members.items():
            header, said = file.tell(), size if claimed is None else claimed
            extra = struct.pack("<HHQQ", 1, 16, said, said)
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, most, most, len(name), len(extra)))
            file.write(name + extra)
            begin = file.tell()
            for position, piece in pieces.items():
                file.seek(begin + position)
                file.write(piece)
            file.seek(begin + size)
            extra = struct.pack("<HHQQQ", 1, 24, said, said, header)
            sizes = (0, most, most, len(name), len(extra), 0, 0, 0, 0, most)
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, *sizes) + name + extra
        start = file.tell()
        file.write(directory + zip64_end(len(members), len(directory), start, start + len(directory)))
    return path


def small(path: Path, claimed: int | None = None) -> Path:
    members = {PICKLE.name: (len(PICKLE.data), {0: PICKLE.data}), RECORD.name: (8, {0: DATA})}
    return wide(path, members, claimed)


@pytest.mark.guarantee("zip64", "zip-structure")
@pytest.mark.parametrize("size", [None, 10**6, 2**40, 2**63, 2**64 - 1])
def test_zip64_sizes_are_read_and_checked(tmp_path: Path, size: int | None) -> None:
    path = small(tmp_path / "a.pt", size)
    if size is None:
        assert read(path)["w"].tolist() == [1, 2]
    else:
        assert f"member 'a/data.pkl' is outside the archive. {DAMAGED}" in refusal(path)


@pytest.mark.guarantee("zip64")
def test_over_four_gib(tmp_path: Path) -> None:
    """A record over 4 GiB, and a pickle whose offset needs 64 bits; torch reads the same bytes."""
    numel = 2**32 + 10
    stored = storage(named("torch", "ByteStorage"), numel=b"\x8a\x05" + numel.to_bytes(5, "little"))
    contents = proto(
        state(
            (text("w"), tensor(stored, 0, (numel,))),
            (text("tail"), tensor(stored, numel - 4, (2, 2), (1, 2))),
        )
    )
    path = wide(
        tmp_path / "big.pt",
        {
            b"a/version": (2, {0: b"3\n"}),
            b"a/data/0": (numel, {0: b"\1\2", 2**31: b"\5", numel - 4: b"\6\7\x08\x09"}),
            b"a/data.pkl": (len(contents), {0: contents}),
        },
    )
    if path.stat().st_blocks * 512 > 2**28:
        path.unlink()
        pytest.skip("this file system keeps no holes")
    expected = torch.load(path, mmap=True)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec.tensors["w"]
        assert spec.shape == (numel,)
        for start, stop in ((0, 3), (2**31 - 1, 2**31 + 2), (2**32 - 2, numel)):
            found = read_ranges(checkpoint, [(spec, start, stop)])[0]
            assert found.tolist() == expected["w"][start:stop].tolist()
        (tail,) = (values.tolist() for _, values in stream(checkpoint, checkpoint.spec.tensors["tail"]))
        assert tail == expected["tail"].flatten().tolist() == [6, 8, 7, 9]
