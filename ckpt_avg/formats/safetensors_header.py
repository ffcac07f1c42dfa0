"""The safetensors header: 8 bytes of length, a JSON object, then the data with no gaps.

The format is described in https://github.com/huggingface/safetensors. What that text forbids is refused here,
leading spaces, duplicate keys and holes included. Where it says nothing, the stricter reading is taken:
unknown fields of a tensor are refused, since nobody can know whether they change what the bytes mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any, NoReturn

from ckpt_avg.checkpoint.spec import DTYPES, SUB_BYTE_DTYPES, TensorSpec, contiguous_stride
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.names import check_name, is_text
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

_DAMAGED = "The file is damaged or was not written as safetensors: save or copy it again."
_FIELDS = {"dtype", "shape", "data_offsets"}


def looks_like(head: bytes) -> bool:
    """Whether the first bytes can be those of a safetensors file: a length, then a JSON object."""
    return len(head) >= 9 and head[8:9] == b"{"


def read_header(file: InputFile) -> bytes:
    """Returns the JSON of the header, unparsed.

    Raises:
        CheckpointFormatError: it exceeds the file or a limit.
    """
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > LIMITS.header:
        _fail(file, f"expected a header of at most {LIMITS.header:,} bytes, got {length:,}. {_DAMAGED}")
    if 8 + length > file.size:
        _fail(file, f"expected a header of {length:,} bytes, got a file of {file.size:,} bytes. {_DAMAGED}")
    header = file.read(8, length)
    if not header.startswith(b"{"):
        _fail(file, f"expected a JSON object as header, got {quote(header[:1])} at its beginning. {_DAMAGED}")
    # Each tensor needs a brace of its own, two lists and four colons: this bounds what is built before it is built.
    # What is quoted again lies inside of a string: JSON in the metadata, as this package writes it.
    braces = header.count(b"{") - header.count(b'{\\"')
    if braces > LIMITS.tensors + 2:
        _fail(file, f"expected at most {LIMITS.tensors:,} tensors in the header, got more. {_DAMAGED}")
    if header.count(b"[") > 4 * braces + 1_000 or header.count(b":") - header.count(b'\\":') > 5 * braces + 100_000:
        _fail(file, f"the header: expected tensors, got a great many other values. {_DAMAGED}")
    return header


def parse_header(file: InputFile, header: bytes) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Parses and checks the whole header.

    Args:
        file: the file, whose size must be what the header says.
        header: what `read_header` returned.

    Returns:
        The tensors by name, in the order of the header, and ``__metadata__``.

    Raises:
        CheckpointFormatError: the header breaks a rule of the format, or exceeds a limit.
    """
    metadata, entries = _parse(file, header)
    data_start = 8 + len(header)
    placed = sorted(
        ((_tensor(file, name, entry, data_start)) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes),
    )
    _check_no_gaps(file, placed, data_start)
    by_name = {tensor.name: tensor for tensor in placed}
    return {name: by_name[name] for name in entries}, metadata


def _fail(file: InputFile, what: str) -> NoReturn:
    raise CheckpointFormatError(f"{file.path}: {what}")


def _parse(file: InputFile, header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        parsed = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_plain_integer,
        )
    except RecursionError:
        _fail(file, f"the header nests too deeply. {_DAMAGED}")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        _fail(file, f"the header is no valid JSON: {str(error)[:200]}. {_DAMAGED}")
    if not isinstance(parsed, dict):
        _fail(file, f"expected a JSON object as header, got {type(parsed).__name__}. {_DAMAGED}")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _fail(file, f"__metadata__: expected an object of strings. {_DAMAGED}")
    for text in (*metadata, *metadata.values()):
        if not is_text(text):
            _fail(file, f"__metadata__: expected text, got the lone surrogate in {quote(text)}. {_DAMAGED}")
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
    raise ValueError(f"{text} is no JSON number")


class _NoSize:
    """An integer that cannot be a size: it is refused where the tensor's name is known, and is no text either."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return self._digits


def _plain_integer(text: str) -> int | _NoSize:
    return int(text) if len(text) <= 20 and text != "-0" else _NoSize(text)


def _tensor(file: InputFile, name: str, entry: Any, data_start: int) -> TensorSpec:
    check_name(name, file.path)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = listing(sorted(map(quote, entry))) if isinstance(entry, dict) else type(entry).__name__
        raise _bad(file, name, f"expected the fields data_offsets, dtype, shape, got {found}. {_DAMAGED}")
    code = entry["dtype"]
    if code in SUB_BYTE_DTYPES:
        raise _bad(
            file,
            name,
            f"dtype {code} packs several numbers into a byte and can't be averaged. "
            "Average the checkpoints before quantisation.",
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise _bad(file, name, f"expected a dtype out of {', '.join(DTYPES)}, got {quote(code)}. {_DAMAGED}")
    dtype = DTYPES[code]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or len(shape) > LIMITS.rank:
        raise _bad(file, name, f"expected a shape of at most {LIMITS.rank} sizes ≥ 0, got {quote(shape)}. {_DAMAGED}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(file, name, f"expected data_offsets [begin, end], got {quote(offsets)}. {_DAMAGED}")
    nbytes = dtype.itemsize
    for extent in shape:
        nbytes *= extent
        if nbytes > LIMITS.elements:
            raise _bad(file, name, f"shape {quote(shape)} overflows 63 bits. {_DAMAGED}")
    begin, end = offsets
    if end - begin != nbytes:
        raise _bad(
            file,
            name,
            f"expected {nbytes:,} bytes for {dtype.name} {quote(shape)}, got data_offsets of "
            f"{end - begin:,} bytes. {_DAMAGED}",
        )
    start = data_start + begin
    return TensorSpec(name, dtype, tuple(shape), contiguous_stride(tuple(shape)), 0, start, (start, nbytes))


def _bad(file: InputFile, name: str, problem: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{file.path}: tensor {quote(name)}: {problem}")


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**64 for value in values)


def _check_no_gaps(file: InputFile, placed: Iterable[TensorSpec], data_start: int) -> None:
    position: int = data_start
    before: TensorSpec | None = None
    for tensor in placed:
        if tensor.offset != position:
            problem = "overlaps" if tensor.offset < position else "leaves a hole after"
            previous = "the header" if before is None else f"tensor {quote(before.name)}"
            _fail(
                file,
                f"tensor {quote(tensor.name)} {problem} {previous}: expected it to begin at byte "
                f"{position - data_start:,} of the data, got {tensor.offset - data_start:,}. {_DAMAGED}",
            )
        position, before = tensor.offset + tensor.nbytes, tensor
    if position > file.size:
        _fail(
            file,
            f"expected {position:,} bytes, got {file.size:,}: {plural(position - file.size, 'byte')} missing. "
            "It is truncated: copy it again.",
        )
    if position < file.size:
        _fail(file, f"expected {position:,} bytes, got {file.size:,}: {file.size - position:,} too many. {_DAMAGED}")
