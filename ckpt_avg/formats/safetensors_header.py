"""The safetensors header: 8 bytes of length, a JSON object, then the data without gaps.

The format is described in https://github.com/huggingface/safetensors. What that text forbids is refused here,
duplicate keys and holes included, except leading spaces, which its library reads. Where it says nothing, the stricter
reading is used: unknown fields of a tensor are refused, since they might change what the bytes mean.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Iterable
from itertools import repeat
from operator import add, attrgetter
from typing import Any, NoReturn

from ckpt_avg.checkpoint.spec import DTYPES, SUB_BYTE_DTYPES, DType, TensorSpec, contiguous_stride
from ckpt_avg.errors import fail
from ckpt_avg.files.input_file import Readable
from ckpt_avg.formats.tensor_names import check_names, is_text
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

_SPACES = b" \t\n\r"  # of JSON
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = '{"__metadata__":'
_SIZE = "(?:0|[1-9][0-9]{0,17})"
# A tensor as safetensors itself writes it, if its name needs no escapes, and what follows it.
_COMPACT = re.compile(
    r'("([^"\\\0-\x1f]*)":\{"dtype":"(\w+","shape":\[[0-9,]*)\],"data_offsets":\[(SIZE),(SIZE)\]\}'
    r"(?:,|\}[ \t\n\r]*\Z))".replace("SIZE", _SIZE)
)
# Its group of the dtype and the shape.
_LAYOUT = re.compile(r'(\w+)","shape":\[(SIZE(?:,SIZE)*|)'.replace("SIZE", _SIZE))
_PIECE = 30_000  # characters that are parsed at a time: few enough to stay in the cache of a core


def matches(head: bytes) -> bool:
    """Whether the first bytes can be those of a safetensors file: a length, then a JSON object."""
    is_length = int.from_bytes(head[:8], "little") <= LIMITS.header
    return head[8:9] == b"{" or (is_length and head[8:].lstrip(_SPACES)[:1] == b"{")


def read_header(file: Readable) -> bytes:
    """Returns the JSON of the header, unparsed.

    Raises:
        CheckpointFormatError: it exceeds the file or a limit.
    """
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > LIMITS.header:
        fail(file.path, f"expected a header of at most {LIMITS.header:,} bytes, got {length:,}")
    if 8 + length > file.size:
        fail(file.path, f"expected a header of {length:,} bytes, got a file of {file.size:,} bytes")
    header = file.read(8, length)
    if not header.lstrip(_SPACES).startswith(b"{"):
        fail(file.path, f"expected a JSON object as header, got {quote(header[:1])} at its beginning")
    return header


def parse_header(file: Readable, header: bytes) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Returns the tensors by name, in the order of the header, and ``__metadata__``.

    Raises:
        CheckpointFormatError: the header breaks a rule of the format, or exceeds a limit.
    """
    refuse_too_many_values(file, header)
    data_start = 8 + len(header)
    compact = _parse_compact(header, data_start)
    metadata, entries = _parse(file, header if compact is None else compact[0])
    if compact is None:
        tensors = {name: _tensor(file, name, entry, data_start) for name, entry in entries.items()}
    else:
        tensors = compact[1]
    check_names(tensors, file.path)
    _check_no_gaps(file, sorted(tensors.values(), key=attrgetter("storage")), data_start)
    return tensors, metadata


def refuse_too_many_values(file: Readable, header: bytes) -> None:
    """Limits what is built of a header before it is built.

    Raises:
        CheckpointFormatError: it has too many tensors or other values.
    """
    # Each tensor needs a brace of its own, two lists and four colons. What is quoted again is inside a string: JSON in
    # the metadata, as this package writes it.
    escapes = header.rfind(b"\\") + 3  # where the last of them ends, with the two bytes that may follow
    braces = header.count(b"{") - header.count(b'{\\"', 0, escapes)
    if braces > LIMITS.tensors + 2:
        fail(file.path, f"expected at most {LIMITS.tensors:,} tensors in the header, got more")
    brackets, colons = header.count(b"["), header.count(b":") - header.count(b'\\":', 0, escapes)
    if brackets > 4 * braces + 100_000 or colons > 5 * braces + 100_000:  # names in the metadata have some, too
        fail(file.path, "the header: expected tensors, got too many other values")


def _parse_compact(header: bytes, data_start: int) -> tuple[bytes, dict[str, TensorSpec]] | None:
    """Returns a header without its tensors, and the tensors; None unless all are valid and written compactly.

    For many small tensors, this takes less than half the time that JSON takes, and hardly more memory than the result.
    """
    try:
        text = header.decode()
        has_metadata = text.startswith(_METADATA)
        head = json.JSONDecoder().raw_decode(text, len(_METADATA))[1] if has_metadata else 0  # where it ends
    except (ValueError, RecursionError):
        return None
    if text[head : head + 1] != ("," if has_metadata else "{"):
        return None
    rest = text[:head] + "}" if has_metadata else "{}"
    begin = head + 1
    tensors: dict[str, TensorSpec] = {}
    count = 0
    layout_of = functools.lru_cache(maxsize=1024)(_layout)  # most tensors of a model have one of a few shapes
    while begin < len(text):
        following = _COMPACT.search(text, begin + _PIECE)
        end = len(text) if following is None else following.start()
        found = _COMPACT.findall(text, begin, end)
        # A comma follows each tensor but the last.
        if not found or text.endswith(",", begin, end) is (following is None):
            return None
        entries, names, layouts, firsts, ends = zip(*found, strict=True)
        known = [layout for layout in map(layout_of, layouts) if layout is not None]
        if len(known) < len(found) or sum(map(len, entries)) != end - begin:  # something was skipped
            return None
        dtypes, shapes, strides, sizes = zip(*known, strict=True)
        starts = [data_start + int(first) for first in firsts]
        if [data_start + int(last) for last in ends] != list(map(add, starts, sizes)):
            return None
        specs = map(TensorSpec, names, dtypes, shapes, strides, repeat(0), starts, zip(starts, sizes, strict=True))
        tensors.update(zip(names, specs, strict=True))
        count += len(found)
        begin = end
    is_whole = 0 < count == len(tensors)
    return (rest.encode(), tensors) if is_whole and "__metadata__" not in tensors else None


def _layout(text: str) -> tuple[DType, tuple[int, ...], tuple[int, ...], int] | None:
    """Returns the dtype, the shape, its stride and its bytes; None if there is no such dtype, or it exceeds a limit."""
    is_long = text.count(",") > LIMITS.rank  # of these, one is in front of the shape
    found = None if is_long else _LAYOUT.fullmatch(text)
    if found is None or found[1] not in DTYPES:
        return None
    dtype, shape = DTYPES[found[1]], tuple(map(int, found[2].split(","))) if found[2] else ()
    nbytes = _nbytes(shape, dtype)
    return (dtype, shape, contiguous_stride(shape), nbytes) if nbytes <= LIMITS.elements else None


def _parse(file: Readable, header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        parsed = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_plain_integer,
        )
    except RecursionError:
        fail(file.path, "the header nests too deeply")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        fail(file.path, f"the header is not valid JSON: {str(error)[:200]}")
    if not isinstance(parsed, dict):
        fail(file.path, f"expected a JSON object as header, got {type(parsed).__name__}")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(file.path, "__metadata__: expected an object of strings")
    for text in (*metadata, *metadata.values()):
        if not is_text(text):
            fail(file.path, f"__metadata__: expected text, got the lone surrogate in {quote(text)}")
    return metadata, parsed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {quote(key)}")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


class _NoSize:
    """An integer that cannot be a size: it is refused once the tensor's name is known, and is not text either."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return self._digits


def _plain_integer(text: str) -> int | _NoSize:
    return int(text) if len(text) <= 20 and text != "-0" else _NoSize(text)


def _tensor(file: Readable, name: str, entry: Any, data_start: int) -> TensorSpec:
    path = file.path
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = listing(sorted(map(quote, entry))) if isinstance(entry, dict) else type(entry).__name__
        fail(path, f"expected the fields data_offsets, dtype, shape, got {found}", tensor=name)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        _refuse_dtype(file, name, code)
    dtype = DTYPES[code]
    if not _sizes(shape) or len(shape) > LIMITS.rank:
        fail(path, f"expected a shape of at most {LIMITS.rank} sizes ≥ 0, got {quote(shape)}", tensor=name)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(path, f"expected data_offsets [begin, end], got {quote(offsets)}", tensor=name)
    shape = tuple(shape)
    nbytes = _nbytes(shape, dtype)
    if nbytes > LIMITS.elements:
        fail(path, f"shape {quote([*shape])} overflows 63 bits", tensor=name)
    begin, end = offsets
    if end - begin != nbytes:
        got = f"got data_offsets of {end - begin:,} bytes"
        fail(path, f"expected {nbytes:,} bytes for {dtype.name} {quote([*shape])}, {got}", tensor=name)
    start = data_start + begin
    return TensorSpec(name, dtype, shape, contiguous_stride(shape), 0, start, (start, nbytes))


def _refuse_dtype(file: Readable, name: str, code: object) -> NoReturn:
    if code in SUB_BYTE_DTYPES:
        advice = "Average the checkpoints before quantisation"
        fail(file.path, f"dtype {code} packs several numbers into a byte and can't be averaged", advice, tensor=name)
    fail(file.path, f"expected one of the dtypes {', '.join(DTYPES)}, got {quote(code)}", tensor=name)


def _sizes(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110 - a generator takes twice as long for two numbers
        if type(value) is not int or not 0 <= value < 2**64:
            return False
    return True


def _nbytes(shape: tuple[int, ...], dtype: DType) -> int:
    """Returns the bytes of a tensor; more than the limit if even those of its first extents are more."""
    nbytes = dtype.itemsize
    for extent in shape:
        nbytes *= extent
        if nbytes > LIMITS.elements:
            break
    return nbytes


def _check_no_gaps(file: Readable, ordered: Iterable[TensorSpec], data_start: int) -> None:
    position: int = data_start
    before: TensorSpec | None = None
    for tensor in ordered:
        if tensor.offset != position:
            problem = "overlaps" if tensor.offset < position else "leaves a hole after"
            previous = "the header" if before is None else f"tensor {quote(before.name)}"
            bounds = f"it to begin at byte {position - data_start:,} of the data, got {tensor.offset - data_start:,}"
            fail(file.path, f"tensor {quote(tensor.name)} {problem} {previous}: expected {bounds}")
        position, before = sum(tensor.storage), tensor
    sizes = f"expected {position:,} bytes, got {file.size:,}"
    if position > file.size:
        missing = plural(position - file.size, "byte")
        fail(file.path, f"{sizes}: {missing} missing", "It is truncated: copy it again")
    if position < file.size:
        fail(file.path, f"{sizes}: {file.size - position:,} too many")
