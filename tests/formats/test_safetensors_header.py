"""The safetensors reader: agrees with safetensors itself on what is valid, and refuses what is not, saying why."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from formats.reading import refusal
from formats.safetensors_bytes import lay_out, one
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_avg.checkpoint.spec import DTYPES, CheckpointSpec
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats import safetensors_header
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.limits import LIMITS

TORCH_DTYPES = {name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items()}


def two(first: str, second: str, data: bytes) -> bytes:
    """A file of two U8 tensors ``left`` and ``right`` with the given offsets, shaped to fit them."""

    def entry(offsets: str) -> str:
        begin, end = json.loads(offsets)
        return f'{{"dtype":"U8","shape":[{end - begin}],"data_offsets":{offsets}}}'

    return lay_out(f'{{"left":{entry(first)},"right":{entry(second)}}}', data)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "checkpoint.safetensors"
    path.write_bytes(content)
    return path


def spec_of(path: Path) -> CheckpointSpec:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec


def assert_same_as_safetensors(path: Path) -> None:
    """Names, dtypes, shapes and bytes are those that safetensors reads from the same file."""
    content = path.read_bytes()
    theirs = dict(safetensors.deserialize(content))
    with open_checkpoint(path) as checkpoint:
        ours = checkpoint.spec.tensors
        assert set(ours) == set(theirs)
        assert list(ours) == [name for name in json.loads(content[8:].split(b"}}")[0] + b"}}") if name in ours]
        for name, tensor in ours.items():
            assert tensor.name == name
            assert tensor.dtype.name == theirs[name]["dtype"]
            assert list(tensor.shape) == theirs[name]["shape"]
            assert tensor.nbytes == len(theirs[name]["data"])
            assert checkpoint.files[tensor.file].read(tensor.offset, tensor.nbytes) == bytes(theirs[name]["data"])
            assert tensor.is_contiguous
        with safetensors.safe_open(path, framework="pt") as opened:
            assert checkpoint.spec.metadata == (opened.metadata() or {})
            for name, tensor in ours.items():
                assert getattr(torch, tensor.dtype.torch_name) == opened.get_tensor(name).dtype


# --- what is valid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", DTYPES)
def test_each_dtype_is_read_as_safetensors_reads_it(tmp_path: Path, code: str) -> None:
    path = tmp_path / "all.safetensors"
    raw = torch.arange(6 * DTYPES[code].itemsize, dtype=torch.uint8)
    values = (raw % 2).view(torch.bool) if code == "BOOL" else raw.view(TORCH_DTYPES[code])
    save_file({"w": values.view(2, 3), "scalar": values[0].clone(), "none": values[:0].clone()}, path)
    assert_same_as_safetensors(path)
    assert {tensor.dtype.name for tensor in spec_of(path).tensors.values()} == {code}


def test_all_dtypes_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    save_file({f"of {code}": torch.zeros(3, dtype=dtype) for code, dtype in TORCH_DTYPES.items()}, path)
    assert_same_as_safetensors(path)
    spec = spec_of(path)
    assert spec.format == "safetensors"
    assert spec.state_key is None
    assert spec.nbytes == sum(3 * dtype.itemsize for dtype in DTYPES.values())


@pytest.mark.guarantee("empty-tensors")
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 5), (5, 0, 2), (1, 1, 1, 1), (2, 3, 4), (1,) * LIMITS.rank])
def test_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """0-d and zero-size tensors are at valid offsets between others."""
    path = tmp_path / "shapes.safetensors"
    save_file({"a": torch.ones(3), "w": torch.ones(shape), "z": torch.ones(2, dtype=torch.uint8)}, path)
    assert_same_as_safetensors(path)
    assert spec_of(path).tensors["w"].shape == shape


NAMES = [
    "",
    " ",
    "日本語.weight",
    "e\u0301",
    "\U0001f9e0",
    '"quoted"\\',
    "../../etc/passwd",
    "\x1b[31m",
    "\x7f",
    "a/b",
    "{{[",
]


@pytest.mark.guarantee("tensor-names")
def test_names_are_data(tmp_path: Path) -> None:
    """Unicode, escapes, control characters and paths in names come through as they are."""
    path = tmp_path / "names.safetensors"
    save_file({name: torch.full((1,), float(number)) for number, name in enumerate(NAMES)}, path)
    assert set(spec_of(path).tensors) == set(NAMES)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    with open_checkpoint(path) as checkpoint:
        for name, tensor in checkpoint.spec.tensors.items():
            assert checkpoint.files[0].read(tensor.offset, 4) == bytes(theirs[name]["data"])


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"a": "", "é": "\n{[", "": "x" * 10_000}])
def test_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "metadata.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata=metadata)
    assert spec_of(path).metadata == (metadata or {})


def test_names_of_metadata_alone_are_no_tensors(tmp_path: Path) -> None:
    path = write(tmp_path, lay_out('{"__metadata__":{"a":"b"}}'))
    assert not spec_of(path).tensors


def test_no_tensors_is_valid_and_empty(tmp_path: Path) -> None:
    """Whether there is anything to average is decided later, not by the reader."""
    path = write(tmp_path, lay_out("{}"))
    assert safetensors.deserialize(path.read_bytes()) == []
    assert not spec_of(path).tensors


@pytest.mark.parametrize(("before", "after"), [("", " " * 9), (" ", ""), ("\n\t \r", "\n")])
def test_spaces_around_the_header_are_valid(tmp_path: Path, before: str, after: str) -> None:
    padded = lay_out(f'{before}{{"w":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}{after}', b"\7")
    assert_same_as_safetensors(write(tmp_path, padded))


def test_the_order_of_the_header_is_kept(tmp_path: Path) -> None:
    """Names come in the order of the header, even if the data has another."""
    path = write(tmp_path, two("[1,3]", "[0,1]", b"\1\2\3"))
    tensors = spec_of(path).tensors
    assert list(tensors) == ["left", "right"]
    assert tensors["left"].offset == tensors["right"].offset + 1


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(one())
    assert spec_of(path).format == "safetensors"


def test_a_state_key_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, one())
    with pytest.raises(CheckpointFormatError, match=r"has one flat state dict, so --state-key model matches nothing"):
        open_checkpoint(path, state_key="model")


def test_a_name_of_the_longest_length_is_read(tmp_path: Path) -> None:
    name = "é" * (LIMITS.name // 2)
    assert list(spec_of(write(tmp_path, one(name=name))).tensors) == [name]


# --- what is not -------------------------------------------------------------------------------------------

REJECTED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # length and header
    "empty file": (b"", ("got an empty file", "Copy or save it again.")),
    "under 8 bytes": (b"\x02\0\0\0\0", ("expected a safetensors file", "got 5 bytes", "Copy or save it again.")),
    "a length and no header": (b"\0" * 8, ("expected a safetensors file",)),
    "header longer than the file": (
        lay_out("{}", length=100),
        ("expected a header of 100 bytes", "got a file of 10 bytes", "save or copy it again"),
    ),
    "header of one byte too many": (
        lay_out("{}", length=3),
        ("expected a header of 3 bytes", "got a file of 10 bytes"),
    ),
    "header over the format's limit": (
        lay_out("{}", length=100_000_001),
        ("expected a header of at most 100,000,000 bytes", "got 100,000,001"),
    ),
    "header length 2^63": (lay_out("{}", length=2**63), ("at most 100,000,000 bytes", "9,223,372,036,854,775,808")),
    "header length 2^64-1": (lay_out("{}", length=2**64 - 1), ("at most 100,000,000", "18,446,744,073,709,551,615")),
    "header cut short": (lay_out('{"w":{"dtype":"U8","shape"'), ("not valid JSON",)),
    "header is a list": (lay_out("[]"), ("expected a safetensors file",)),
    "bytes after the object": (lay_out("{} {}"), ("not valid JSON",)),
    "spaces without an object": (lay_out(" " * 9), ("expected a safetensors file",)),
    "single quotes": (lay_out("{'w':1}"), ("not valid JSON",)),
    "trailing comma": (lay_out('{"__metadata__":{"a":"b",}}'), ("not valid JSON",)),
    "raw control character": (one(name="a\nb"), ("not valid JSON",)),
    # data
    "truncated data": (
        one('"F32"', "[2]", "[0,8]", data=b"12345"),
        ("expected 70 bytes, got 67: 3 bytes missing", "truncated: copy it again"),
    ),
    "no data at all": (one('"F32"', "[2]", "[0,8]", data=b""), ("8 bytes missing",)),
    "trailing bytes": (one(data=b"\1\2\3"), ("2 too many", "save or copy it again")),
    "overlap": (two("[0,4]", "[2,6]", b"abcdef"), ("tensor 'right' overlaps tensor 'left'", "byte 4", "got 2")),
    "the same bytes twice": (two("[0,4]", "[0,4]", b"abcd"), ("'right'", "overlaps", "'left'")),
    "hole": (two("[0,2]", "[4,6]", b"abcdef"), ("tensor 'right' leaves a hole after tensor 'left'", "byte 2", "got 4")),
    "hole at the start": (one(offsets="[1,2]", data=b"ab"), ("tensor 'w' leaves a hole after the header", "got 1")),
    # offsets
    "begin > end": (one(offsets="[1,0]"), ("tensor 'w'", "expected data_offsets [begin, end]", "got [1, 0]")),
    "negative offset": (one(offsets="[-1,0]"), ("tensor 'w'", "-1")),
    "one offset": (one(offsets="[0]"), ("tensor 'w'", "expected data_offsets [begin, end]")),
    "three offsets": (one(offsets="[0,1,1]"), ("tensor 'w'", "expected data_offsets [begin, end]")),
    "float offset": (one(offsets="[0,1.0]"), ("tensor 'w'", "expected data_offsets", "1.0")),
    "bool offset": (one(offsets="[false,true]"), ("tensor 'w'", "expected data_offsets", "True")),
    "offset of 2^64": (one(offsets=f"[0,{2**64}]"), ("tensor 'w'", str(2**64))),
    "offsets no list": (one(offsets='"01"'), ("tensor 'w'", "expected data_offsets")),
    "offsets of another size than the shape": (
        one('"F32"', "[2]", "[0,4]", data=b"abcd"),
        ("tensor 'w'", "expected 8 bytes for F32", "[2]", "data_offsets of 4 bytes"),
    ),
    "offsets of more bytes than the shape": (
        one('"U8"', "[2]", "[0,4]", data=b"abcd"),
        ("tensor 'w'", "expected 2 bytes for U8", "data_offsets of 4 bytes"),
    ),
    # shapes
    "negative size": (one(shape="[-1]"), ("tensor 'w'", "expected a shape", "-1")),
    "minus zero": (one(shape="[-0]"), ("-0",)),
    "float size": (one(shape="[1.0]"), ("tensor 'w'", "expected a shape", "1.0")),
    "exponent size": (one(shape="[1e0]"), ("tensor 'w'", "expected a shape")),
    "bool size": (one(shape="[true]"), ("tensor 'w'", "expected a shape", "True")),
    "null size": (one(shape="[null]"), ("tensor 'w'", "expected a shape", "None")),
    "string size": (one(shape='["1"]'), ("tensor 'w'", "expected a shape")),
    "shape no list": (one(shape="1"), ("tensor 'w'", "expected a shape")),
    "shape null": (one(shape="null"), ("tensor 'w'", "expected a shape")),
    "product over 63 bits": (one(shape=f"[{2**32},{2**32}]"), ("tensor 'w'", "overflows 63 bits", str(2**32))),
    "size of 2^63 with a zero": (one(shape=f"[{2**63},0]", offsets="[0,0]", data=b""), ("tensor 'w'", str(2**63))),
    "product of bytes over 63 bits": (one('"F64"', f"[{2**60}]"), ("tensor 'w'", "overflows 63 bits")),
    "rank 1000": (one(shape=str([1] * 1000)), ("tensor 'w'", f"at most {LIMITS.rank} sizes")),
    "rank 65": (one(shape=str([1] * 65)), ("tensor 'w'", "at most 64 sizes")),
    "5,000 digits": (one(shape="[" + "1" * 5000 + "]"), ("tensor 'w'", "1111")),
    # dtypes
    "unknown dtype": (one('"F128"'), ("tensor 'w'", "expected one of the dtypes", "got 'F128'", *DTYPES)),
    "lower-case dtype": (one('"u8"'), ("tensor 'w'", "expected one of the dtypes", "got 'u8'")),
    "dtype a number": (one("8"), ("tensor 'w'", "expected one of the dtypes", "got 8")),
    "dtype null": (one("null"), ("tensor 'w'", "expected one of the dtypes", "got None")),
    "dtype a list": (one('["U8"]'), ("tensor 'w'", "expected one of the dtypes")),
    "dtype an object": (one("{}"), ("tensor 'w'", "expected one of the dtypes")),
    **{
        f"sub-byte {code}": (one(f'"{code}"', "[2]"), ("tensor 'w'", code, "can't be averaged", "before quantisation"))
        for code in ("F4", "F6_E2M3", "F6_E3M2")
    },
    # entries
    "unknown field": (
        lay_out('{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"extra":1}}', b"\1"),
        ("tensor 'w'", "expected the fields data_offsets, dtype, shape", "'extra'"),
    ),
    "missing field": (
        lay_out('{"w":{"dtype":"U8","shape":[0]}}'),
        ("tensor 'w'", "expected the fields data_offsets, dtype, shape", "got 'dtype', 'shape'"),
    ),
    "entry a list": (lay_out('{"w":[]}'), ("tensor 'w'", "expected the fields", "got list")),
    "entry null": (lay_out('{"w":null}'), ("tensor 'w'", "expected the fields", "got NoneType")),
    "duplicate tensor": (
        lay_out(
            '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"\1",
        ),
        ("duplicate key 'w'",),
    ),
    "duplicate after unescaping": (
        lay_out(
            '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0077":{"dtype":"U8","shape":[1],'
            '"data_offsets":[0,1]}}',
            b"\1",
        ),
        ("duplicate key 'w'",),
    ),
    "duplicate field": (
        lay_out('{"w":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\1"),
        ("duplicate key 'dtype'",),
    ),
    "duplicate __metadata__": (
        lay_out('{"__metadata__":{},"__metadata__":{"a":"b"}}'),
        ("duplicate key '__metadata__'",),
    ),
    "duplicate inner key": (lay_out('{"__metadata__":{"a":"b","a":"c"}}'), ("duplicate key 'a'",)),
    # metadata
    **{
        f"metadata value {value}": (lay_out(f'{{"__metadata__":{{"a":{value}}}}}'), ("__metadata__", "strings"))
        for value in ("1", "null", "true", "[]", "{}", "1.5")
    },
    **{
        f"metadata {value}": (lay_out(f'{{"__metadata__":{value}}}'), ("__metadata__", "expected an object of strings"))
        for value in ("null", "[]", '"x"', "1", "true")
    },
    "lone surrogate in a metadata value": (lay_out('{"__metadata__":{"a":"\\ud800"}}'), ("__metadata__", "surrogate")),
    "lone surrogate in a metadata key": (lay_out('{"__metadata__":{"\\udfff":"a"}}'), ("__metadata__", "surrogate")),
    # names
    "not UTF-8": (lay_out(b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), ("not valid JSON", "utf-8")),
    "overlong UTF-8": (lay_out(b'{"\xc0\x80":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), ("utf-8",)),
    "surrogate in UTF-8": (lay_out(b'{"\xed\xa0\x80":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), ("utf-8",)),
    "lone surrogate": (one(name="\\ud800"), (r"tensor '\ud800'", "lone surrogate")),
    "NUL in a name": (one(name="a\\u0000b"), (r"tensor 'a\x00b'", "has a NUL character")),
    "over-long name": (
        one(name="x" * (LIMITS.name + 1)),
        ("tensor 'xxx", "(4099 characters)", "at most 4,096 bytes", "got 4,097"),
    ),
    "over-long name in bytes": (one(name="é" * (LIMITS.name // 2 + 1)), ("at most 4,096 bytes", "got 4,098")),
    "control characters shown escaped": (one('"X"', name="\\u001b[31mred"), (r"tensor '\x1b[31mred'",)),
    # JSON
    "deep lists": (lay_out('{"w":' + "[" * 100_000 + "]" * 100_000 + "}"), ("the header",)),
    "deep objects": (lay_out('{"w":' * 50_000 + "1" + "}" * 50_000), ("nests too deeply",)),
    "NaN": (one(shape="[NaN]"), ("NaN is not a JSON number",)),
    "Infinity": (one(shape="[Infinity]"), ("Infinity is not a JSON number",)),
    "-Infinity": (one(offsets="[-Infinity,0]"), ("-Infinity is not a JSON number",)),
    "an infinite float": (one(shape="[1e999]"), ("tensor 'w'", "expected a shape", "inf")),
}
# What safetensors 0.8 takes and this reader does not: the format's text forbids it, or is silent.
STRICTER = {
    "size of 2^63 with a zero",
    "rank 1000",
    "rank 65",
    "unknown field",
    "duplicate field",
    "duplicate tensor",
    "duplicate after unescaping",
    "duplicate __metadata__",
    "duplicate inner key",
    "NUL in a name",
    "over-long name",
    "over-long name in bytes",
    "sub-byte F4",
    "metadata null",
}


@pytest.mark.guarantee("safetensors-bytes", "tensor-names")
@pytest.mark.parametrize("case", REJECTED)
def test_each_violation_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """The message holds the path, the tensor, what was expected and what was found."""
    content, facts = REJECTED[case]
    message = refusal(write(tmp_path, content))
    for fact in facts:
        assert fact in message


@pytest.mark.parametrize("case", sorted(REJECTED.keys() - STRICTER))
def test_the_violations_are_ones_for_safetensors_too(case: str) -> None:
    """The literals above are wrong for the reason they claim, not by a slip of this file."""
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(REJECTED[case][0])


def test_the_unchanged_files_are_valid(tmp_path: Path) -> None:
    """The literals above differ from valid ones in the one thing they name."""
    for content in (one(), two("[0,2]", "[2,6]", b"abcdef")):
        assert_same_as_safetensors(write(tmp_path, content))


@pytest.mark.guarantee("safetensors-limits")
@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_lying_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = write(tmp_path, lay_out("{}", length=length))
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.guarantee("safetensors-cut")
def test_the_truncation_of_a_real_file_is_refused_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    for end in range(len(whole)):
        refusal(write(tmp_path, whole[:end]))


# --- limits ------------------------------------------------------------------------------------------------


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets limits of the reader to small values."""

    def set_limits(**values: int) -> None:
        for module in ("safetensors_header", "tensor_names"):
            monkeypatch.setattr(f"ckpt_avg.formats.{module}.LIMITS", replace(LIMITS, **values))

    return set_limits


MANY = lay_out(
    '{"__metadata__":{"format":"pt"},'
    + ",".join(f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(12))
    + "}"
)


@pytest.mark.guarantee("safetensors-limits")
@pytest.mark.parametrize(
    ("content", "name", "most", "fact"),
    [
        (one(), "header", len(one()) - 9, "expected a header of at most 52 bytes, got 53"),
        (MANY, "tensors", 12, "expected at most 11 tensors in the header, got more"),
        (one(name="éé"), "name", 4, "tensor 'éé': expected a name of at most 3 bytes, got 4"),
        (one(shape="[1,1,1]"), "rank", 3, "tensor 'w': expected a shape of at most 2 sizes ≥ 0, got [1, 1, 1]."),
        (one('"F32"', "[2,2]", "[0,16]", data=b"\0" * 16), "elements", 16, "overflows"),
    ],
    ids=["header", "tensors", "name", "rank", "elements"],
)
def test_what_exceeds_a_limit_is_refused(
    tmp_path: Path, limit: Any, content: bytes, name: str, most: int, fact: str
) -> None:
    path = write(tmp_path, content)
    limit(**{name: most})
    spec_of(path)
    limit(**{name: most - 1})
    assert fact in refusal(path)


@pytest.mark.guarantee("safetensors-limits")
def test_a_million_and_more_empty_tensors_are_refused_before_parsing(tmp_path: Path) -> None:
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    count = LIMITS.tensors + 3
    body = b"{" + b",".join([(entry % 0).encode()] * count) + b"}"
    path = write(tmp_path, lay_out(body))
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "expected at most 1,000,000 tensors in the header, got more" in message
    assert peak < 2.5 * len(body)


@pytest.mark.guarantee("safetensors-limits")
@pytest.mark.parametrize(
    ("first", "item", "last"),
    [
        ('{"w":[', "[],", "[]]}"),
        ('{"__metadata__":{"":""', ',"%x":""', "}}"),
    ],
    ids=["empty lists", "metadata keys"],
)
def test_a_header_of_many_small_values_stays_bounded(tmp_path: Path, first: str, item: str, last: str) -> None:
    """Peak memory stays under 64 MiB + 4 × header, whatever the header is made of."""
    size = 6 * 2**20
    body = "".join(item % number for number in range(size // 11)) if "%x" in item else item * (size // len(item))
    path = write(tmp_path, lay_out(first + body + last))
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointFormatError):
            open_checkpoint(path).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20 + 4 * path.stat().st_size


# --- against safetensors, on generated headers -------------------------------------------------------------

_SCRATCH = tempfile.TemporaryDirectory(prefix="safetensors-fuzz-")
_FUZZ = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _remove_scratch() -> Iterator[None]:
    yield
    _SCRATCH.cleanup()


def accepted_by_safetensors(path: Path) -> bool:
    try:
        safetensors.deserialize(path.read_bytes())
        with safetensors.safe_open(path, framework="np"):
            return True
    except safetensors.SafetensorError:
        return False


def accepted_here(path: Path) -> bool:
    """Any exception but the documented one fails the test."""
    try:
        spec = spec_of(path)
    except CheckpointFormatError as error:
        assert str(error).startswith(f"{path}: ")
        return False
    size = path.stat().st_size
    assert all(8 <= tensor.offset <= tensor.offset + tensor.nbytes <= size for tensor in spec.tensors.values())
    return True


def outcome(path: Path) -> object:
    """The tensors and the metadata, or the error."""
    try:
        spec = spec_of(path)
    except CheckpointFormatError as error:
        return str(error)
    return list(spec.tensors.items()), spec.metadata


def assert_no_laxer_than_safetensors(content: bytes) -> None:
    """Nothing that safetensors refuses is read; the short way to read a compact header, in pieces, changes nothing."""
    path = write(Path(_SCRATCH.name), content)
    with mock.patch.object(safetensors_header, "_parse_compact", return_value=None):
        expected = outcome(path)
    assert outcome(path) == expected
    with mock.patch.object(safetensors_header, "_PIECE", 1):  # a piece for each tensor
        assert outcome(path) == expected
    if accepted_here(path):
        assert accepted_by_safetensors(path), content[:500]


_ENTRIES = [f'"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{at + 1}]}}' for at, name in enumerate("abcd")]


@pytest.mark.parametrize("between", [",", "}", "} ", "}, ", " ,", ",,", "", ',"', "},{"])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_what_is_between_two_tensors(place: int, between: str) -> None:
    """Also where a piece of a long header ends."""
    text = "{" + ",".join(_ENTRIES[:place]) + between + ",".join(_ENTRIES[place:]) + "}"
    assert_no_laxer_than_safetensors(lay_out(text, b"\0" * 4))


def _valid() -> bytes:
    path = Path(_SCRATCH.name) / "valid.safetensors"
    tensors = {
        "a.weight": torch.ones(2, 3),
        "n": torch.tensor(7),
        "é": torch.ones(0, 4, dtype=torch.float16),
        "fp8": torch.zeros(5, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


VALID = _valid()
(HEADER_LENGTH,) = struct.unpack("<Q", VALID[:8])
_TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-", b"e", b"null", b"true", b" ", b"\\", b"\\u0000"]
_TOKENS += [b"\\ud800", b"18446744073709551616", b"\x00", b"\xff", b"F4", b'"__metadata__":{},', b"\xef\xbb\xbf", b"\t"]
_edits = st.lists(
    st.tuples(st.integers(0, HEADER_LENGTH), st.integers(0, 4), st.sampled_from(_TOKENS) | st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


@_FUZZ
@given(edits=_edits, keep_length=st.booleans(), tail=st.integers(-3, 3))
def test_mutated_headers(edits: list[tuple[int, int, bytes]], keep_length: bool, tail: int) -> None:
    """Nothing that safetensors rejects is accepted, and nothing but the documented exception comes out."""
    header, data = VALID[8 : 8 + HEADER_LENGTH], VALID[8 + HEADER_LENGTH :]
    for position, removed, inserted in edits:
        header = header[:position] + inserted + header[position + removed :]
    data = data[:tail] if tail < 0 else data + b"\0" * tail
    assert_no_laxer_than_safetensors(lay_out(header, data, HEADER_LENGTH if keep_length else None))


@_FUZZ
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda raw: lay_out(b"{" + raw)))
def test_arbitrary_bytes(content: bytes) -> None:
    assert_no_laxer_than_safetensors(content)


_numbers = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.0, True])
_texts = st.text(alphabet=st.characters(codec=None), max_size=4) | st.sampled_from(
    ["__metadata__", "w", "\ud800", "\0"]
)
_junk = st.recursive(st.none() | _numbers | _texts, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
_good_entry = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)).map(list)
_bad_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "nope"]) | _junk,
        "shape": st.lists(_numbers, max_size=3) | _junk,
        "data_offsets": st.lists(_numbers, min_size=2, max_size=2) | _junk,
    },
    optional={"extra": _junk},
)


@_FUZZ
@given(
    tensors=st.lists(st.tuples(_texts, _good_entry | _bad_entry | _junk), max_size=4),
    metadata=st.none() | st.dictionaries(_texts, _texts, max_size=2) | _junk,
    ascii_only=st.booleans(),
    separators=st.sampled_from([(",", ":"), (", ", ": ")]),
    tail=st.sampled_from([0, 0, 0, 0, -1, 1]),
    shift=st.sampled_from([0, 0, 0, 0, -1, 1]),
)
@example(tensors=[], metadata={"a": "\ud800"}, ascii_only=True, separators=(",", ":"), tail=0, shift=0)
@example(tensors=[], metadata={"\udc00": ""}, ascii_only=True, separators=(",", ":"), tail=0, shift=0)
def test_generated_headers(
    tensors: list[Any], metadata: Any, ascii_only: bool, separators: tuple[str, str], tail: int, shift: int
) -> None:
    """Well-formed entries with correct offsets are mixed with wrong ones, so that both answers are reached."""
    parts, position = [], 0
    if metadata is not None:
        parts.append(("__metadata__", metadata))
    for name, entry in tensors:
        if isinstance(entry, list) and len(entry) == 2 and entry[0] in list(DTYPES) and isinstance(entry[1], list):
            size = DTYPES[entry[0]].itemsize
            for extent in entry[1]:
                size *= extent
            offsets = [position + (shift if parts else 0), position + size]
            parts.append((name, {"dtype": entry[0], "shape": entry[1], "data_offsets": offsets}))
            position += size
        else:
            parts.append((name, entry))
    encode = json.JSONEncoder(ensure_ascii=ascii_only, separators=separators).encode
    text = ",".join(f"{encode(name)}:{encode(value)}" for name, value in parts)
    header = f"{{{text}}}".encode("utf-8", "surrogatepass")
    assert_no_laxer_than_safetensors(lay_out(header, b"\0" * max(0, position + tail)))
