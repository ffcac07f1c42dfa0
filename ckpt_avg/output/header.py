"""The header of the output, byte for byte as safetensors itself would write it.

The layout is that of the reference implementation (``safetensors/src/tensor.rs``, ``prepare``): compact JSON,
``__metadata__`` first, tensors by falling dtype rank and then by name, padded with spaces to a multiple of 8. With
several metadata keys the reference uses another order in each process; here they are sorted.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from pathlib import Path

from ckpt_avg.checkpoint.spec import DType
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, OutputError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.safetensors_header import read_header, refuse_too_many_values
from ckpt_avg.limits import LIMITS
from ckpt_avg.mean.plan import OutputTensor


def encode_tensors(tensors: Sequence[OutputTensor], prefix: str = "") -> bytes:
    """Returns the tensors' part of a file's header: a JSON object without its braces. The file has these alone.

    The names in it lack the ``prefix``.
    """
    first = tensors[0].offset if tensors else 0
    parts: list[str] = []
    for tensor in tensors:
        begin = tensor.offset - first
        end = begin + tensor.numel * tensor.dtype.itemsize
        name = encode_basestring(tensor.name.removeprefix(prefix))
        parts.append(f"{name}:{{{_layout(tensor.dtype, tensor.shape)}[{begin},{end}]}}")
    return ",".join(parts).encode()


@functools.lru_cache(maxsize=1024)  # most tensors of a model have one of a few shapes
def _layout(dtype: DType, shape: tuple[int, ...]) -> str:
    return f'"dtype":"{dtype.name}","shape":[{",".join(map(str, shape))}],"data_offsets":'


def encode_header(tensors: bytes, metadata: Mapping[str, str], *, room: int = 0, size: int = 0) -> bytes:
    """Returns the 8 bytes of length and the JSON, padded with spaces.

    Args:
        tensors: from `encode_tensors`.
        metadata: for ``__metadata__``.
        room: bytes to leave free for metadata that will be longer when the header is encoded again.
        size: bytes of the result, if it is to be longer than necessary.

    Raises:
        IncompatibleError: the header would exceed the format's limit.
    """
    about = f'"__metadata__":{_compact(dict(sorted(metadata.items())))}'.encode() if metadata else b""
    parts = (b"{", about, b"," if about and tensors else b"", tensors, b"}")
    used = sum(map(len, parts))
    length = max(used + room, size - 8)
    length += -length % 8
    if length > LIMITS.header:
        raise IncompatibleError(
            f"the output's header would be {length:,} bytes long, but safetensors allows {LIMITS.header:,}. "
            "Average fewer tensors or checkpoints at once, or omit --sha256."
        )
    return b"".join((struct.pack("<Q", length), *parts, b" " * (length - used)))


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def refuse_damaged(path: Path, header: bytes, size: int, target: Path) -> None:
    """Reads the finished file's header back before the file is published; the header is what this package reads, too.

    Args:
        path: a path by which the file can be read.
        header: what was written at its beginning, from `encode_header`.
        size: bytes of the whole file.
        target: the path of the output.

    Raises:
        OutputError: the file has another header or size, or this package would not read it.
    """
    try:
        with InputFile(path, reserve=0) as file:  # the last one
            found = read_header(file)
            refuse_too_many_values(file, found)
            is_whole = file.size == size and file.read(0, 8) + found == header
    except CheckpointFormatError as error:
        raise OutputError(f"{target}: the output cannot be read: {error} It is not published.") from error
    if not is_whole:
        raise OutputError(f"{target}: is not what was written: another program changed it. It is not published.")
