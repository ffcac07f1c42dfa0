"""torch files whose zip, pickle or stream lies, each written byte by byte: one line, exit 3, no output.

The smallest checkpoint is a zip of two members: a pickle of one tensor ``w``, and its eight bytes. Each case below is
that file with one thing changed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from formats.pickles.test_unpickler import EVIL, named, proto, sequence, text, whole
from safetensors.torch import load_file
from system.faults.test_bad_safetensors import refusal, refusal_of

from ckpt_avg import CheckpointFormatError, open_checkpoint
from ckpt_avg.files.input_file import FileRange
from ckpt_avg.limits import LIMITS

Command = Callable[..., tuple[int, str, str]]
DATA = struct.pack("<2f", 1, 2)
DAMAGED = "The file is damaged: save or copy it again."
DISTRUST = "Don't trust this file; save the weights again where they come from."


# --- zips, byte by byte ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One member, as its local header and the directory tell of it; None: what is true."""

    name: bytes
    data: bytes
    flags: int = 0
    method: int = 0
    stored: bytes | None = None
    local: tuple[int | bytes | None, ...] = (None, None, None, None, None)  # name, flags, method, CRC, size
    at: int | None = None
    disk: int = 0
    size: int | None = None
    extra: bytes = b""

    def header(self) -> bytes:
        """The local header and the bytes behind it."""
        stored = self.data if self.stored is None else self.stored
        true = (self.name, self.flags, self.method, zlib.crc32(self.data), len(self.data))
        name, flags, method, crc, size = (b if a is None else a for a, b in zip(self.local, true, strict=True))
        assert isinstance(name, bytes)
        packed = size if self.stored is None else len(stored)
        return struct.pack("<4s5H3I2H", b"PK\3\4", 20, flags, method, 0, 0, crc, packed, size, len(name), 0) + (
            name + stored
        )

    def entry(self, at: int) -> bytes:
        """What the directory says."""
        size = len(self.data) if self.size is None else self.size
        packed = size if self.stored is None else len(self.stored)
        numbers = (20, 20, self.flags, self.method, 0, 0, zlib.crc32(self.data), packed, size)
        lengths = (len(self.name), len(self.extra), 0, self.disk, 0, 0, at if self.at is None else self.at)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers, *lengths) + self.name + self.extra


def end(count: int, length: int, start: int, *, disk: int = 0, here: int | None = None) -> bytes:
    """The end of the directory."""
    return struct.pack("<4s4H2IH", b"PK\5\6", disk, 0, count if here is None else here, count, length, start, 0)


def joined(*members: Member) -> tuple[bytes, bytes]:
    """The members one behind the other, and their directory."""
    body, directory = b"", b""
    for member in members:
        directory += member.entry(len(body))
        body += member.header()
    return body, directory


def archive(*members: Member) -> bytes:
    """A whole archive."""
    body, directory = joined(*members)
    return body + directory + end(len(members), len(directory), len(body))


# --- pickles, opcode by opcode -----------------------------------------------------------------------------


def storage(kind: bytes = named("torch", "FloatStorage"), key: bytes = text("0"), numel: bytes = whole(2)) -> bytes:
    """A reference to a record."""
    return sequence(text("storage"), kind, key, text("cpu"), numel) + b"Q"


def tensor(
    stored: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,)
) -> bytes:
    """A view of a record."""
    lengths = [sequence(*(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in each))
               for each in (shape, stride)]  # fmt: skip
    arguments = sequence(stored or storage(), whole(offset), *lengths, b"\x89", b"}")
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def state(*items: tuple[bytes, bytes]) -> bytes:
    """A dict of pickled keys and values."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def weights(value: bytes, name: str = "w") -> bytes:
    """A state dict of one value."""
    return state((text(name), value))


PICKLE = Member(b"a/data.pkl", proto(2, weights(tensor())))
RECORD = Member(b"a/data/0", DATA)


def holding(contents: bytes, *others: Member) -> bytes:
    """An archive with other contents of its pickle."""
    return archive(Member(b"a/data.pkl", proto(2, contents)), *others, RECORD)


def changed(member: Member, **changes: object) -> Member:
    """One of the two members with something changed."""
    return Member(**{name: getattr(member, name) for name in Member.__dataclass_fields__} | changes)  # type: ignore[arg-type]


WHOLE = archive(PICKLE, RECORD)
BODY, DIRECTORY = joined(PICKLE, RECORD)
RECORD_AT = len(PICKLE.header())
HOLLOW = RECORD.header()[:30]  # a local header alone


def with_end(last: bytes) -> bytes:
    return BODY + DIRECTORY + last


def zip64(at: int | None = None, magic: bytes = b"PK\6\6") -> bytes:
    """The archive with its end in 64 bits."""
    begin = len(BODY + DIRECTORY)
    record = struct.pack("<4sQ2H2I4Q", magic, 44, 45, 45, 0, 0, 2, 2, len(DIRECTORY), len(BODY))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin if at is None else at, 1)
    return with_end(record + locator + end(2, 2**32 - 1, 2**32 - 1))


INNER = RECORD.header()  # a complete member, hidden in the bytes of another
OUTER = Member(b"a/outer", b"\0" * 10 + INNER)

ZIPS: dict[str, tuple[bytes, str]] = {
    "cut to 10 bytes": (WHOLE[:10], "expected a zip archive, got 10 bytes of one"),
    "cut by one byte": (WHOLE[:-1], "expected the zip directory at the end of the file"),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], "got other bytes: it is probably truncated"),
    "a byte behind it": (WHOLE + b"\0", "expected the zip directory at the end"),
    "bytes before it": (b"PK\3\4" + WHOLE, "expected the directory to end at byte"),
    "bytes before it, offsets made to fit": (
        b"PK\3\4" + BODY + changed(PICKLE).entry(4) + RECORD.entry(4 + RECORD_AT)
        + end(2, len(DIRECTORY), 4 + len(BODY)),
        "expected the archive at byte 0, got its first member at byte 4",
    ),
    "one name twice": (archive(PICKLE, RECORD, RECORD), "member 'a/data/0' appears twice"),
    "one member inside another": (
        archive(PICKLE, OUTER, changed(RECORD, at=RECORD_AT + 30 + len(OUTER.name) + 10)),
        "member 'a/data/0' overlaps the one before it",
    ),
    "deflated": (
        archive(PICKLE, changed(RECORD, method=8, stored=zlib.compress(DATA)[2:-4])),
        "member 'a/data/0' is compressed, which torch.save never does",
    ),
    "deflated by its size alone": (
        archive(PICKLE, changed(RECORD, stored=DATA[:4])), "member 'a/data/0' is compressed"),
    "a bomb": (
        archive(PICKLE, changed(RECORD, data=bytes(10**6), method=8, stored=zlib.compress(bytes(10**6))[2:-4])),
        "member 'a/data/0' is compressed",
    ),
    "encrypted": (archive(PICKLE, changed(RECORD, flags=1)), "member 'a/data/0' is encrypted"),
    "another name in the local header": (
        archive(PICKLE, changed(RECORD, local=(b"a/data/1", None, None, None, None))),
        "member 'a/data/0': its local header contradicts the directory",
    ),
    "other flags in the local header": (
        archive(PICKLE, changed(RECORD, local=(None, 1, None, None, None))), "/0': its local header contradicts"),
    "another method in the local header": (
        archive(PICKLE, changed(RECORD, local=(None, None, 8, None, None))), "/0': its local header contradicts"),
    "another CRC in the local header": (
        archive(PICKLE, changed(RECORD, local=(None, None, None, 1, None))), "/0': its local header contradicts"),
    "another size in the local header": (
        archive(PICKLE, changed(RECORD, local=(None, None, None, None, 4))), "/0': its local header contradicts"),
    "a name that is no text": (
        archive(PICKLE, changed(RECORD, name=b"a/data/\xff")), r"the member name b'a/data/\xff' is not UTF-8"),
    "a member beyond the file": (
        archive(PICKLE, changed(RECORD, at=10**6)), "member 'a/data/0' begins outside the archive"),
    "a member at no local header": (
        archive(PICKLE, changed(RECORD, at=RECORD_AT + 1)), "member 'a/data/0' is outside the archive"),
    "a member longer than the file": (
        archive(PICKLE, changed(RECORD, size=10**6, local=(None, None, None, None, 10**6))),
        "member 'a/data/0' is outside the archive",
    ),
    "a member on another disk": (archive(PICKLE, changed(RECORD, disk=1)), "got one split over several disks"),
    "an archive on several disks": (
        with_end(end(2, len(DIRECTORY), len(BODY), disk=1)), "got one split over several disks"),
    "members on other disks": (
        with_end(end(2, len(DIRECTORY), len(BODY), here=1)), "got one split over several disks"),
    "fewer members than counted": (
        with_end(end(3, len(DIRECTORY), len(BODY))), "the directory is shorter than it says"),
    "more members than counted": (
        with_end(end(1, len(DIRECTORY), len(BODY))), "the directory is longer than it says"),
    "a directory of something else": (
        BODY + b"XX" + DIRECTORY[2:] + end(2, len(DIRECTORY), len(BODY)), "the directory is damaged"),
    "a directory elsewhere": (
        with_end(end(2, len(DIRECTORY), 0)), f"expected the directory to end at byte {len(BODY + DIRECTORY):,}, got"),
    "a directory of 4 GiB": (
        with_end(end(2, 2**32 - 1, 0)), "expected a directory of at most 268,435,456 bytes, got 4,294,967,295"),
    "no zip64 sizes": (archive(PICKLE, changed(RECORD, at=2**32 - 1)), "a member's zip64 sizes are missing"),
    "too few zip64 sizes": (
        archive(PICKLE, changed(RECORD, at=2**32 - 1, size=2**32 - 1, extra=struct.pack("<2HQ", 1, 8, 8))),
        "a member's zip64 sizes are missing",
    ),
    "a zip64 end beyond the file": (zip64(at=2**63), "the zip64 directory record is outside the archive"),
    "a zip64 end elsewhere": (zip64(at=0), "the zip64 directory record is not where the archive says"),
    "a zip64 end of something else": (zip64(magic=b"PK\6\5"), "the zip64 directory record is not where"),
}  # fmt: skip


def write(folder: Path, content: bytes, name: str = "step_1.pt") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def average_of(command: Command, *sources: Path) -> dict[str, torch.Tensor]:
    """What the command makes of checkpoints that it must accept."""
    output = sources[0].parent / "mean.safetensors"
    code, _, err = command("average", *sources, "--output", output)
    assert code == 0, err
    found = load_file(output)
    output.unlink()
    return found


def test_the_archive_by_hand_is_read_before_it_is_spoilt(in_process: Command, tmp_path: Path) -> None:
    """By the standard library, by torch (which wants one member more), and by the command, all alike."""
    version = Member(b"a/version", b"3\n")
    for content in (WHOLE, archive(version, PICKLE, RECORD), zip64()):
        path = write(tmp_path, content)
        with zipfile.ZipFile(path) as zipped:
            assert zipped.testzip() is None
            assert zipped.read("a/data/0") == DATA
        assert average_of(in_process, path)["w"].tolist() == [1, 2]
    loaded = torch.load(write(tmp_path, archive(version, PICKLE, RECORD)))
    assert loaded["w"].tolist() == [1, 2]


@pytest.mark.guarantee("zip-cut", "zip-structure")
@pytest.mark.parametrize("case", ZIPS)
def test_a_zip_that_lies_is_refused(in_process: Command, tmp_path: Path, case: str) -> None:
    """Read in spite of it, the weights would be other bytes than the writer's."""
    content, fact = ZIPS[case]
    message = refusal_of(in_process, write(tmp_path, content), folder=tmp_path)
    assert fact in message
    assert message.endswith(DAMAGED)


# --- what the archive and its pickle hold ------------------------------------------------------------------

QUANTIZED = named("torch._utils", "_rebuild_qtensor") + b")R"
ADVICE = "Save it as a plain tensor (for example tensor.to_dense(), .dequantize() or .full_tensor()) and run again."


def subclass(module: str, name: str) -> bytes:
    """A wrapper subclass, as ``torch.save`` writes DTensor."""
    rebuild, kind = named("torch._utils", "_rebuild_wrapper_subclass"), named(module, name)
    return named("torch._tensor", "_rebuild_from_type_v2") + sequence(rebuild, kind, sequence(kind), b"}") + b"R"


def stored_as(kind: str) -> bytes:
    return tensor(storage(named("torch", kind)))


KINDS: dict[str, tuple[bytes, str]] = {
    "quantized": (QUANTIZED, "a quantized tensor"),
    "a quantized storage": (stored_as("QInt8Storage"), "a quantized tensor"),
    "sparse": (named("torch._utils", "_rebuild_sparse_tensor") + b")R", "a sparse tensor"),
    "sparse rows": (named("torch._utils", "_rebuild_sparse_csr_tensor") + b")R", "a sparse tensor"),
    "nested": (named("torch._utils", "_rebuild_nested_tensor") + b")R", "a nested tensor"),
    "meta": (named("torch._utils", "_rebuild_meta_tensor_no_storage") + b")R", "a tensor on the meta device"),
    "complex128": (stored_as("ComplexDoubleStorage"), "a complex128 tensor, which safetensors cannot hold"),
    "DTensor": (subclass("torch.distributed.tensor", "DTensor"), "a tensor subclass (torch.distributed.tensor.DTensor"),
    "another subclass": (subclass("evil\x1b[31m", "T"), r"a tensor subclass (evil\x1b[31m.T)"),
    "uninitialised": (named("torch.nn.parameter", "UninitializedParameter") + b")R", "an uninitialised parameter"),
}  # fmt: skip
HUGE = 2**63
HELD: dict[str, tuple[bytes, str]] = {
    # the archive
    "a program of TorchScript": (
        archive(PICKLE, Member(b"a/constants.pkl", b"\x80\2).")),
        "expected weights, got a TorchScript program. In a trusted environment, save them with "
        "torch.save(torch.jit.load(path).state_dict(), new_path).",
    ),
    "no pickle": (archive(Member(b"a/x", b"")), "expected a zip written by torch.save, got one with 'a/x'. Name a"),
    "two pickles": (
        archive(PICKLE, Member(b"b/data.pkl", PICKLE.data)),
        "expected a zip written by torch.save, got one with 'a/data.pkl', 'b/data.pkl'. Name a checkpoint file.",
    ),
    "big-endian": (
        archive(PICKLE, Member(b"a/byteorder", b"big"), RECORD),
        "expected little-endian tensors, got another byte order. Save it again on a little-endian machine",
    ),
    # tensors and their records
    "no record": (archive(PICKLE), "tensor 'w': expected the record '0', got none. Copy the file again."),
    "a record elsewhere": (
        holding(weights(tensor(storage(key=text("../data.pkl"))))), "expected the record '../data.pkl', got none"),
    "a record that is too long": (
        archive(PICKLE, Member(b"a/data/0", DATA + b"\0")),
        "tensor 'w': expected a record of 8 bytes, got 9. The file is damaged: save or copy it again.",
    ),
    "a record of another dtype": (
        holding(weights(stored_as("DoubleStorage"))), "tensor 'w': expected a record of 16 bytes, got 8."),
    "a view past its end": (
        holding(weights(tensor(offset=1))),
        "tensor 'w': expected elements inside a record of 8 bytes, got a view that ends at byte 12. Save it again.",
    ),
    "a view before its begin": (holding(weights(tensor(offset=-1))), "tensor 'w': expected sizes and strides from 0"),
    "a negative stride": (
        holding(weights(tensor(offset=1, stride=(-1,)))),
        "tensor 'w': expected sizes and strides from 0 to 2⁶³−1, got shape (2,), stride (-1,), offset 1. Save it again",
    ),
    "more sizes than strides": (holding(weights(tensor(stride=()))), "tensor 'w': expected sizes and strides"),
    "a size of 2^63": (holding(weights(tensor(shape=(HUGE,), stride=(0,)))), f"got shape ({HUGE},)"),
    "sizes whose product overflows": (
        holding(weights(tensor(shape=(2**32, 2**32), stride=(0, 0)))),
        "tensor 'w': shape (4294967296, 4294967296) overflows 63 bits. Save it again.",
    ),
    "an expansion bomb": (
        holding(weights(tensor(shape=(10**6, 10**6), stride=(0, 0)))),
        "tensor 'w': expected at most the 8 bytes of its record, got an expanded view of "
        "4,000,000,000,000 bytes. Save tensor.contiguous() instead.",
    ),
    "65 dimensions": (
        holding(weights(tensor(shape=(1,) * 65, stride=(1,) * 65))),
        f"expected a shape or stride of at most 64 integers, got 65. {DISTRUST}",
    ),
    "a shape that is no tuple": (
        holding(weights(named("torch", "Size") + sequence(text("22")) + b"R")),
        f"expected a tuple of integers as shape or stride, got 'str'. {DISTRUST}",
    ),
    "a tensor of no storage": (
        holding(weights(named("torch._utils", "_rebuild_tensor_v2") + sequence(b"N", b"K\0", b")", b")") + b"R")),
        f"a tensor of the pickle refers to no storage. {DISTRUST}",
    ),
    **{
        name: (holding(weights(content)), f"tensor 'w': expected a plain tensor, got {kind}")
        for name, (content, kind) in KINDS.items()
    },
    "a numpy array": (
        holding(weights(named("numpy._core.multiarray", "_reconstruct") + b")R")),
        "tensor 'w': expected a plain tensor, got a numpy array. Save torch.from_numpy(array) in its place and run",
    ),
    # names
    "a number as name": (
        holding(state((b"K\7", tensor()), (text("w"), tensor()))), "the file: expected tensor names, got the key 7."),
    "bytes as name": (
        holding(state((b"U\1w", tensor()), (text("v"), tensor())).replace(b"U\1w", b"C\1w")),
        "the file: expected tensor names, got the key b'w'.",
    ),
    "a lone surrogate in a name": (
        holding(state((b"X\3\0\0\0\xed\xa0\x80", tensor()))), "its name has a lone surrogate, so it is not text."),
    "NUL in a name": (holding(weights(tensor(), "a\0b")), r"tensor 'a\x00b': its name has a NUL character"),
    "the name of the metadata": (
        holding(weights(tensor(), "__metadata__")),
        "tensor '__metadata__': safetensors reserves this name for its metadata. Rename the tensor.",
    ),
    "two names that become one": (
        holding(state(*((text(f"{wrapper}w"), tensor()) for wrapper in ("model.", "")))),
        "without the prefix two tensors would have the same name: 'w'. Choose another --strip-prefix.",
    ),
    # state dicts
    "two state dicts": (
        holding(state((text("net_g"), weights(tensor())), (text("net_d"), weights(tensor())))),
        "expected one state dict, got several: 'net_g', 'net_d'. Choose one with --state-key, for example "
        "--state-key net_g.",
    ),
    "an object of an unknown class": (
        holding(named("models", "Net") + b")\x81"),
        "expected a state dict, got a pickled object of class 'models.Net'. In a trusted environment, load it and save "
        "model.state_dict() instead.",
    ),
    "no tensors": (holding(weights(whole(3), "epoch")), "expected a state dict, got a dict with the keys 'epoch'"),
    "a tensor in a list": (
        holding(state((text("w"), tensor()), (text("v"), b"]" + tensor() + b"a"))),
        "the file: 'v': expected a plain tensor, got tensors inside a list. Save model.state_dict(), whose values are",
    ),
}  # fmt: skip
OPTIONS = {"two names that become one": ("--strip-prefix", "model.")}


@pytest.mark.guarantee(
    "byte-order",
    "expanded-views",
    "nested-state-dicts",
    "odd-tensors",
    "pickled-modules",
    "storage-bounds",
    "tensor-keys",
    "torchscript",
)
@pytest.mark.parametrize("case", HELD)
def test_contents_that_cannot_be_averaged_are_refused(in_process: Command, tmp_path: Path, case: str) -> None:
    """The tensor is named, and what to do about it said."""
    content, fact = HELD[case]
    assert fact in refusal_of(in_process, write(tmp_path, content), *OPTIONS.get(case, ()), folder=tmp_path)


@pytest.mark.guarantee("odd-tensors")
@pytest.mark.parametrize("case", KINDS)
def test_tensors_of_odd_kinds_beside_the_weights_do_no_harm(in_process: Command, tmp_path: Path, case: str) -> None:
    """Only what is averaged must be plain."""
    content = holding(state((text("cache"), b"]" + KINDS[case][0] + b"a"), (text("state_dict"), weights(tensor()))))
    assert average_of(in_process, write(tmp_path, content))["w"].tolist() == [1, 2]


@pytest.mark.guarantee("tensor-keys")
def test_of_one_name_twice_in_a_dict_the_last_counts(in_process: Command, tmp_path: Path) -> None:
    """As Python itself reads it, and torch.load."""
    twice = state((text("w"), tensor(shape=(1,))), (text("w"), tensor(offset=1, shape=(1,))))
    path = write(tmp_path, holding(twice, Member(b"a/version", b"3\n")))
    assert torch.load(path)["w"].tolist() == [2]
    assert average_of(in_process, path)["w"].tolist() == [2]


@pytest.mark.guarantee("tied-tensors")
def test_two_names_of_one_tensor_are_both_written_and_said(in_process: Command, tmp_path: Path) -> None:
    """The output holds each, so that it loads into any model; the user is told that they were one."""
    both = state((text("a"), tensor() + b"q\7"), (text("b"), b"h\7"))
    path = write(tmp_path, holding(both))
    output = tmp_path / "mean.safetensors"
    code, _, err = in_process("average", path, "--output", output)
    assert (code, {name: value.tolist() for name, value in load_file(output).items()}) == (
        0,
        {"a": [1, 2], "b": [1, 2]},
    )
    assert "Notice: tied weights are written under each of their names: 'a'='b'" in err


# --- hostile pickles ---------------------------------------------------------------------------------------


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.parametrize("name", EVIL)
def test_a_hostile_pickle_is_averaged_without_its_code_or_refused(
    in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Beside the weights it changes nothing; in their place it is refused. Either way nothing of it runs."""
    monkeypatch.chdir(tmp_path)
    beside = proto(4, state((text("evil"), EVIL[name]), (text("state_dict"), weights(tensor(storage(numel=whole(6)))))))
    path = write(tmp_path, archive(Member(b"a/data.pkl", beside), Member(b"a/data/0", DATA * 3)))
    assert average_of(in_process, path)["w"].tolist() == [1, 2]
    if name != "hooks of a tensor":  # that one is a tensor
        inside = proto(4, state((text("state_dict"), state((text("evil"), EVIL[name])))))
        refusal_of(in_process, write(tmp_path, archive(Member(b"a/data.pkl", inside), RECORD)), folder=tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_damaged_number_beside_the_weights_is_named_or_does_no_harm(in_process: Command, tmp_path: Path) -> None:
    """The epoch as a tensor with a record that is too long: the weights don't depend on it."""
    epoch = tensor(storage(key=text("1"), numel=whole(1)), shape=(1,))
    content = holding(state((text("epoch"), epoch), (text("model"), weights(tensor()))), Member(b"a/data/1", DATA))
    code, _, err = in_process("average", write(tmp_path, content), "--output", tmp_path / "mean.safetensors")
    assert code == 0 or "'epoch'" in err, err


REBUILD = named("torch._utils", "_rebuild_tensor_v2")

MODULE_PARTS = ("_parameters", "_buffers", "_modules")


def module(parameters: bytes, modules: bytes = b"}") -> bytes:
    """A pickled module, from its class's name and its state."""
    parts = zip(MODULE_PARTS, (parameters, b"}", modules), strict=True)
    return named("models", "Net") + b")\x81" + state(*((text(part), value) for part, value in parts)) + b"b"


PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the pickle is truncated"),
    "no STOP": (b"\x80\2}", "the pickle is truncated"),
    "cut in a text": (b"\x80\2X\4\0\0\0ab", "the pickle is truncated"),
    "an empty stack": (b"\x80\2R.", "the pickle is damaged (IndexError: "),
    "a protocol of the future": (b"\x80\x7f}.", "the pickle is damaged (ValueError: unsupported pickle protocol: 127)"),
    "an unknown operation": (b"\x80\2\xc5.", f"unknown pickle operation 0xc5. {DISTRUST}"),
    "bytes behind STOP": (b"\x80\2}.}.", "bytes follow the end of the pickle. Save the checkpoint again."),
    "bytes behind STOP in a frame": (
        b"\x80\4\x95" + struct.pack("<Q", 3) + b"}.}", "bytes follow the end of the pickle. Save the"),
    "a memo index without end": (
        b"\x80\2Np4294967296\n.", f"expected a memo index below 2³² in the pickle, got a larger one. {DISTRUST}"),
    "an extension code": (b"\x80\2\x82\x7f.", f"the pickle uses extension code 127. {DISTRUST}"),
    "a persistent id of something else": (
        b"\x80\2NQ.", f"a persistent id of the pickle names no storage. {DISTRUST}"),
    "a storage without a key": (
        proto(2, storage(key=b"K\0")), f"a storage of the pickle has no known type, name or size. {DISTRUST}"),
    "a storage of a negative size": (
        proto(2, storage(numel=whole(-1))), f"a storage of the pickle has no known type, name or size. {DISTRUST}"),
    "a call of a text": (proto(2, text("x") + b")R"), f"the pickle calls 'str', which is no function. {DISTRUST}"),
    "a call without arguments": (
        proto(2, named("os", "system") + b"NR"), f"calls a function without a tuple of arguments. {DISTRUST}"),
    "a state of a function": (proto(2, REBUILD + b"}b"), f"the pickle restores a state into a function. {DISTRUST}"),
    "an item appended to a text": (proto(2, text("x") + b"Na"), f"the pickle appends to a str. {DISTRUST}"),
    "an item of a text": (proto(2, text("x") + b"NNs"), f"the pickle sets an item of a str. {DISTRUST}"),
    "members of a text": (proto(4, text("x") + b"(N\x90"), f"the pickle adds to a str. {DISTRUST}"),
    "bytes out of something": (
        proto(2, named("builtins", "bytes") + whole(9) + b"\x85R"), f"the pickle makes bytes of something. {DISTRUST}"),
    "another encoding": (
        proto(2, named("_codecs", "encode") + text("x") + text("rot13") + b"\x86R"),
        f"the pickle encodes something other than bytes as latin1 text. {DISTRUST}",
    ),
    "a module with a name that is no text": (
        proto(2, module(state((b"K\1", tensor())))),
        f"the file: expected names of at most 4,096 characters in a pickled module, got another. {DISTRUST}",
    ),
    "a module with a name without end": (
        proto(2, module(state((text("x" * 4097), tensor())))),
        f"the file: expected names of at most 4,096 characters in a pickled module, got another. {DISTRUST}",
    ),
    "a module of something else": (
        proto(2, module(b"}", state((text("in"), named("models", "Odd") + b")\x81")))),
        f"the file: expected modules in a pickled module, got models.Odd as 'in'. {DISTRUST}",
    ),
}  # fmt: skip


@pytest.mark.guarantee("damaged-pickles", "pickle-bombs", "pickled-modules")
@pytest.mark.parametrize("case", PICKLES)
def test_a_damaged_or_hostile_pickle_is_refused(in_process: Command, tmp_path: Path, case: str) -> None:
    """Never a traceback, and never a smaller checkpoint than the writer's."""
    content, fact = PICKLES[case]
    path = write(tmp_path, archive(Member(b"a/data.pkl", content), RECORD))
    assert fact in refusal_of(in_process, path, folder=tmp_path)


@pytest.mark.guarantee("pickle-bombs")
@pytest.mark.usefixtures("in_time")
def test_modules_nested_too_deeply_are_refused(in_process: Command, tmp_path: Path) -> None:
    """A hundred and one, one in the other; a hundred are a module like any other."""
    for depth, is_refused in ((100, False), (102, True)):
        nested = module(state((text("w"), tensor())))
        for _ in range(depth - 1):
            nested = module(b"}", state((text("m"), nested)))
        path = write(tmp_path, holding(nested))
        if is_refused:
            assert f"modules and tensors, 100 deep, got more. {DISTRUST}" in refusal_of(
                in_process, path, folder=tmp_path
            )
        else:
            assert list(average_of(in_process, path)) == ["m." * 99 + "w"]


@pytest.mark.guarantee("weights-crc")
def test_damaged_weights_are_found_where_all_bytes_are_read(in_process: Command, tmp_path: Path) -> None:
    """With --sha256: a flipped bit of a weight, which no header shows, contradicts the CRC-32 beside it."""
    path = write(tmp_path, WHOLE)
    assert in_process("average", path, "--output", tmp_path / "mean.safetensors", "--sha256")[0] == 0
    broken = WHOLE.replace(DATA, bytes([DATA[0] ^ 1]) + DATA[1:])
    message = refusal_of(in_process, write(tmp_path, broken), "--sha256", "--quiet", folder=tmp_path)
    assert f"member 'a/data/0': expected CRC-32 {zlib.crc32(DATA):08x}, got " in message
    assert message.endswith(DAMAGED)


def foreign_pickles() -> list[bytes]:
    """All bytes in the tests of Python's own pickle module, damaged ones among them; none where they are missing."""
    found = importlib.util.find_spec("test") and importlib.util.find_spec("test.pickletester")
    if not found or not found.origin:
        return []
    tree = ast.parse(Path(found.origin).read_bytes())
    return sorted({node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                   and isinstance(node.value, bytes)})  # fmt: skip


@pytest.mark.guarantee("damaged-pickles")
def test_the_pickles_of_pythons_own_tests_hold_no_weights(tmp_path: Path) -> None:
    """Streams of every protocol, sound, damaged and hostile: the documented exception and nothing else."""
    streams = foreign_pickles()
    if not streams:
        pytest.skip("this Python comes without its tests")
    assert len(streams) > 100
    path = tmp_path / "step_1.pt"
    for stream in streams:
        for content in (archive(Member(b"a/data.pkl", stream), RECORD), b"\x80\2" + stream):
            path.write_bytes(content)
            with pytest.raises(CheckpointFormatError) as caught:
                open_checkpoint(path)
            assert str(caught.value).startswith(f"{path}: ")
            assert str(caught.value).isprintable()


# --- sizes over a limit ------------------------------------------------------------------------------------


@pytest.mark.guarantee("pickle-bombs")
def test_a_pickle_over_the_limit_is_not_read(in_process: Command, tmp_path: Path) -> None:
    """256 MiB and a byte; sparse, so that nothing of it is on the disk."""
    size = LIMITS.pickle + 1
    member = Member(b"a/data.pkl", b"", size=size, local=(None, None, None, None, size))
    _, directory = joined(member)
    path = tmp_path / "step_1.pt"
    with path.open("wb") as file:
        file.write(member.header())
        file.seek(size, os.SEEK_CUR)
        start = file.tell()
        file.write(directory + end(1, len(directory), start))
    message = refusal_of(in_process, path, folder=tmp_path)
    assert (
        message == f"{path}: expected a pickle of at most {size - 1:,} bytes, got {size:,}. Save only the state dict."
    )


def test_a_part_of_a_file_is_never_left(tmp_path: Path) -> None:
    """What lies outside a part of a file belongs to another tensor."""

    class Bytes:
        path, size = tmp_path / "__0_0.distcp", 10

        def read(self, offset: int, length: int) -> bytes:
            return bytes(range(10))[offset : offset + length]

    region = FileRange(Bytes(), 2, 5)
    assert region.read(1, 4) == bytes((3, 4, 5, 6))
    for offset, length in ((-1, 1), (0, 6), (5, 1), (0, -1)):
        with pytest.raises(Exception, match=rf"__0_0\.distcp: expected {length} bytes at byte {2 + offset}") as caught:
            region.read(offset, length)
        assert caught.value.exit_code == 3  # type: ignore[attr-defined]


# --- the stream of torch before 1.6, and other files -------------------------------------------------------

MAGIC = proto(2, b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little"))
VERSION = proto(2, b"M\xe9\3")  # 1001
MACHINE = proto(2, state((text("little_endian"), b"\x88")))
KEYS = proto(2, b"]" + text("0") + b"a")
STORED = struct.pack("<q", 2) + DATA


def old_storage(kind: bytes = named("torch", "FloatStorage"), numel: bytes = whole(2), view: bytes = b"N") -> bytes:
    """A reference to a storage as the stream has it: the view of another comes last."""
    return sequence(text("storage"), kind, text("0"), text("cpu"), numel, view) + b"Q"


def stream(*, version: bytes = VERSION, machine: bytes = MACHINE, contents: bytes | None = None,
           keys: bytes = KEYS, stored: bytes = STORED) -> bytes:  # fmt: skip
    """Five pickles and one storage."""
    return MAGIC + version + machine + (contents or proto(2, weights(tensor(old_storage())))) + keys + stored


PLAIN = "expected a plain storage, got one that is "
STREAMS: dict[str, tuple[bytes, str]] = {
    "another version": (stream(version=proto(2, b"M\xe8\3")), "expected version 1001 of torch's stream, got 1000."),
    "big-endian": (
        stream(machine=proto(2, state((text("little_endian"), b"\x89")))),
        "expected little-endian tensors, got another byte order. Save it again on a little-endian machine",
    ),
    "keys that are no list": (stream(keys=proto(2, b"}")), "expected a list of storage keys, each once. The file is"),
    "a key twice": (stream(keys=proto(2, b"](" + text("0") * 2 + b"e")), "expected a list of storage keys, each once."),
    "a key of no storage": (stream(keys=proto(2, b"]" + text("1") + b"a")), PLAIN + "of unknown size"),
    "a quantized storage": (
        stream(contents=proto(2, weights(tensor(old_storage(named("torch", "QInt8Storage")))))),
        PLAIN + "a quantized tensor, so those after it cannot be found. Save it again: "
        "torch.save(torch.load(path, weights_only=True), new_path).",
    ),
    "an untyped storage": (
        stream(contents=proto(2, weights(tensor(old_storage(named("torch", "UntypedStorage")))))),
        "a tensor of the pickle refers to no storage",
    ),
    "a view of a storage": (
        stream(contents=proto(2, weights(tensor(old_storage(view=sequence(text("1"), b"K\0", b"K\2")))))),
        PLAIN + "a view of a storage, as torch 0.3 saved it",
    ),
    "a storage of 2^63 elements": (
        stream(contents=proto(2, weights(tensor(old_storage(numel=b"\x8a\x09" + HUGE.to_bytes(9, "little")))))),
        "storage '0': expected fewer than 2⁶³ elements. The file is damaged: save or copy it again.",
    ),
    "a storage of another length": (
        stream(stored=struct.pack("<q", 3) + DATA + DATA[:4]),
        "storage '0': expected 2 elements, got 3. The file is damaged: save or copy it again.",
    ),
    "a storage that is cut": (
        stream(stored=STORED[:-3]), "storage '0': 3 bytes missing. It is truncated: copy it again."),
    "no storage": (stream(stored=b""), "expected 8 bytes at byte"),
    "a byte behind it": (
        stream(stored=STORED + b"\0"), "got 1 byte more. The file is damaged: save or copy it again."),
    "cut in its pickles": ((MAGIC + VERSION)[:-1], "the pickle is truncated"),
    "hostile": (stream(machine=proto(2, named("os", "system") + b"NR")), f"without a tuple of arguments. {DISTRUST}"),
    "a tar": (
        b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(250),
        "got a tar archive. If torch before 0.1.10 wrote it, load it there and save it again. Otherwise unpack",
    ),
}  # fmt: skip


@pytest.mark.guarantee("old-torch-files")
def test_the_stream_by_hand_is_read_before_it_is_spoilt(in_process: Command, tmp_path: Path) -> None:
    """As torch itself reads it."""
    path = write(tmp_path, stream())
    assert torch.load(path)["w"].tolist() == [1, 2]
    assert average_of(in_process, path)["w"].tolist() == [1, 2]
    assert pickle.loads(MAGIC) == 0x1950A86A20F9469CFC6C


@pytest.mark.guarantee("byte-order", "old-torch-files")
@pytest.mark.parametrize("case", STREAMS)
def test_an_old_file_that_lies_is_refused(in_process: Command, tmp_path: Path, case: str) -> None:
    """There each storage follows the one before it: one wrong length would shift all that follow."""
    content, fact = STREAMS[case]
    assert fact in refusal_of(in_process, write(tmp_path, content), folder=tmp_path)


@pytest.mark.guarantee("nested-state-dicts")
def test_a_choice_that_a_file_does_not_have_is_refused(in_process: Command, tmp_path: Path) -> None:
    """Another key than the file's, none that holds a state dict, two choices at once."""
    path = write(tmp_path, holding(state((text("epoch"), whole(3)), (text("model"), weights(tensor())))))
    for options, code, says in (
        (("--state-key", "ema"), 3, "expected the key 'ema', got a dict with the keys 'epoch', 'model'. Choose one"),
        (("--state-key", "epoch"), 3, "key 'epoch': expected a state dict, got an object of type int."),
        (("--ema",), 3, "--ema: expected EMA weights"),
        (("--strip-prefix", "net."), 3, "--strip-prefix net.: expected names that begin with it, got 'w'. Change it"),
        (
            ("--ema", "--state-key", "model"),
            2,
            "--ema and --state-key model: both choose the weights. Use one of them.",
        ),
    ):
        assert says in refusal(in_process, path, *options, folder=tmp_path, code=code)
